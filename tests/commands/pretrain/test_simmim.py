"""``pretrain --method simmim``: every kind of encoder learns digits, and all that a run of MAE can is there."""

import json
import math
import shutil
import signal

import pytest
import torch

from mimkernels.cli import main
from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.presets import PRESETS
from mimkernels.commands.pretrain.run import Run, pretrain
from mimkernels.engine.checkpoint import load
from mimkernels.engine.progress import Progress
from mimkernels.engine.training.history import read_entries
from mimkernels.heads import HeadStatistics
from mimkernels.models import SimMIM
from mimkernels.models.build import build_model

VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2}
WINDOWS = {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}
ENCODERS = {
    "vit": {"model": "vit_tiny_patch16_224", "patch_size": 4, "model_kwargs": VIT},
    "beit": {"model": "beit_base_patch16_224", "patch_size": 4, "model_kwargs": VIT},
    "swin": {"model": "swin_tiny_patch4_window7_224", "patch_size": 2, "model_kwargs": WINDOWS},
    "swinv2": {"model": "swinv2_tiny_window8_256", "patch_size": 2, "model_kwargs": WINDOWS},
}

_WIDE = {"embed_dim": 64, "depth": 3, "num_heads": 4}
_WIDE_WINDOWS = {**WINDOWS, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]}
LEARNS = {
    name: {"model_kwargs": _WIDE_WINDOWS if name.startswith("swin") else _WIDE} for name in ENCODERS
}  # fmt: skip


@pytest.fixture
def simmim(tiny):
    def make(encoder="beit", **changes) -> PretrainConfig:
        own = {"method": "simmim", "mask_unit": 4, "decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}
        return tiny(**{**own, **ENCODERS[encoder], **changes})

    return make


def losses(folder) -> list[float]:
    return [entry["loss"] for entry in read_entries(folder / "metrics.jsonl")]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_loss_falls_and_the_weights_are_published(simmim, tmp_path, encoder):
    # Large enough to leave the plateau at 1.35, where every pixel is predicted black, within 90 steps.
    config = simmim(encoder, **LEARNS[encoder], batch_size=50, epochs=3, warmup_epochs=0.5, lr=2e-3, val_images=30)
    result = pretrain(config)
    seen = losses(tmp_path / "run")
    assert sum(seen[-5:]) < 0.8 * sum(seen[:5])
    page = result.report.read_text()
    assert "SimMIM pre-training of" in page and "Mean absolute error of the hidden pixels" in page
    assert "62% of each image" in page  # 10 of 16 units
    assert page.count("reconstruction</figcaption>") == 3
    weights = torch.load(tmp_path / "run" / "simmim_checkpoint.pth", weights_only=True)["model"]
    model = build_model(config.to_dict())
    assert isinstance(model, SimMIM)
    report = model.load_checkpoint(tmp_path / "run" / "simmim_checkpoint.pth")
    assert not report.missing and set(report.loaded) | set(report.left) == set(weights)
    final = load(tmp_path / "run" / "checkpoints" / "final.pt")["model"]
    assert all(torch.equal(value, final[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("encoder", ["beit", "swinv2"])
def test_an_interrupted_run_continues_with_the_same_bits(simmim, tmp_path, monkeypatch, encoder):
    changes = {"epochs": 1, "accum_steps": 2, "batch_size": 150, "schedule": "step", "warmup_blr": 1e-4}
    kwargs = {**ENCODERS[encoder]["model_kwargs"], "drop_path_rate": 0.2}
    changes["model_kwargs"] = kwargs
    pretrain(simmim(encoder, **changes, output=str(tmp_path / "whole")))
    update = Progress.update

    def pressed(self, done, **values):
        update(self, done, **values)
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    config = simmim(encoder, **changes, output=str(tmp_path / "parts"))
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", pressed)
        first = pretrain(config)
    assert first.stopped_by == signal.SIGINT and first.step < 5
    assert pretrain(config, resume="auto").step == 5
    whole, parts = (load(tmp_path / name / "checkpoints" / "final.pt") for name in ("whole", "parts"))
    assert whole["model"].keys() == parts["model"].keys()
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name
    for name, entry in whole["optimizer"]["state"].items():
        for key, value in entry.items():
            assert torch.equal(value, parts["optimizer"]["state"][name][key]), (name, key)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_heads_are_recorded_and_regularised(simmim, tmp_path):
    pretrain(simmim(head_stats="entropy,distance", head_stats_every=2, regularize={"entropy": 1e-2}))
    entries = [json.loads(line) for line in (tmp_path / "run" / "heads.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 4]


@pytest.mark.parametrize("encoder", ["swin", "swinv2"])
def test_heads_in_windows_are_recorded_and_regularised(simmim, tmp_path, encoder):
    stages = {"model_kwargs": {**WINDOWS, "num_heads": [2, 4]}}
    pretrain(simmim(encoder, head_stats="entropy,distance", head_stats_every=2, regularize={"entropy": 1e-2}, **stages))
    entries = [json.loads(line) for line in (tmp_path / "run" / "heads.jsonl").read_text().splitlines()]
    seen = HeadStatistics.from_dict(entries[-1]["heads"])
    assert [len(row[row.isfinite()]) for row in seen.mean("entropy")] == [2, 4, 4]
    assert 0 < seen.layer_mean("entropy").min() and seen.layer_mean("entropy").max() <= math.log(16) + 1e-4
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "NaN" not in json.dumps(metrics)


@pytest.mark.parametrize("published", [False, True])
def test_what_is_decayed(simmim, published):
    tables = ("relative_position_bias_table", "cpb_mlp", "logit_scale")
    for encoder in ENCODERS:
        run = Run(simmim(encoder, decay_bias_tables=published, output=f"{simmim().output}-{encoder}"))
        with run._held:
            _, optimizer = run._prepare()
            names = {id(parameter): name for name, parameter in run.model.named_parameters()}
        groups = {group["weight_decay"]: group["params"] for group in optimizer.optimizer.param_groups}
        assert set(groups) == {0.0, 0.05}
        assert optimizer.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
        plain = {names[id(parameter)] for parameter in groups[0.0]}
        for name, parameter in run.model.named_parameters():
            token = name.rpartition(".")[2] in ("mask_token", "cls_token", "pos_embed")
            table = any(part in name for part in tables) and not name.endswith(".bias")
            expected = parameter.ndim <= 1 or token or (table and not published)
            assert (name in plain) == expected, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_unit": 6}, "mask_unit must be a multiple of the patch size 4 x 4, got 6"),
        ({"mask_unit": 12}, "mask_unit 12 does not divide images of 16 x 16"),
        ({"mask_ratio": 0.99}, "leave some of the 16 units of 4 pixels visible"),
        ({"model": "resnet18"}, "'resnet18' cannot be the encoder"),
        ({"target": "words"}, "target must be pixels, patch-norm"),
    ],
)
def test_settings_that_do_not_fit_are_refused(simmim, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(simmim(**changes))
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_window_that_does_not_fit_is_refused_with_those_that_do(simmim):
    with pytest.raises(ValueError, match="windows of 3 x 3 tokens do not divide the 8 x 8 tokens.*one of 2, 4, 8"):
        pretrain(simmim("swin", model_kwargs={**WINDOWS, "window_size": 3}))


def test_a_run_of_another_method_is_not_continued(simmim, tiny):
    pretrain(simmim("vit"))
    with pytest.raises(ValueError, match=r"another architecture or method.*method: 'simmim' -> 'mae'"):
        pretrain(tiny(), resume="auto")


def test_a_compiled_run_has_the_losses_of_an_eager_one(simmim, tmp_path):
    pretrain(simmim("beit", output=str(tmp_path / "eager")))
    pretrain(simmim("beit", compile=True, output=str(tmp_path / "compiled")))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_settings_that_work_and_build_their_model(name):
    config = PretrainConfig(**PRESETS[name])
    config.check()
    with torch.device("meta"):
        model = build_model(config.to_dict())
    assert model.grid_size == (config.img_size // model.patch_size[0],) * 2
    stride = model.patch_size if config.method == "mae" else model.encoder_stride
    assert stride == ((16, 16) if "vit" in name else (32, 32))


def test_a_preset_comes_before_the_defaults_and_after_what_is_given(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("mimkernels.commands.pretrain.run.Run.__init__", lambda self, config, **_: seen.append(config))
    monkeypatch.setattr(
        "mimkernels.commands.pretrain.run.Run.execute", lambda self: type("Result", (), {"stopped_by": 0})
    )
    words = ["pretrain", "--preset", "simmim-swin-b-100", "--epochs", "7", "--output", str(tmp_path / "run")]
    assert main(words) == 0
    (config,) = seen
    assert (config.method, config.model, config.epochs) == ("simmim", "swin_base_patch4_window7_224", 7)
    assert (config.blr, config.clip_grad, config.model_kwargs["window_size"]) == (1e-4, 5.0, 6)


def test_the_exported_weights_alone_are_probed_as_the_run_is(simmim, tmp_path):
    from mimkernels.commands.probe.config import ProbeConfig
    from mimkernels.engine.encoder import load_encoder

    pretrain(simmim("beit"))
    whole = load_encoder(ProbeConfig(model=str(tmp_path / "run")))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    exported = load_encoder(ProbeConfig(model=str(tmp_path / "run")))
    assert exported.title.startswith("SimMIM beit_base_patch16_224")
    assert exported.fingerprint() == whole.fingerprint()
