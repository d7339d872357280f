"""DINO as a method of ``mimkernels pretrain``."""

import math
from types import SimpleNamespace

import pytest
import torch

from mimkernels.commands.pretrain.methods import METHODS, Moment
from mimkernels.commands.pretrain.run import Run, pretrain
from mimkernels.engine.checkpoint import load
from mimkernels.engine.encoder import load_encoder
from mimkernels.engine.training.history import read_entries
from tests.commands.pretrain.test_run import assert_same_bits, losses, stop_after

SETTINGS = {
    "method": "dino", "decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16, "mlp_dim": 32, "bottleneck_dim": 8,
    "prototypes": 24, "local_crops": 1, "local_size": 8, "val_split": 0.8, "val_images": 30, "batch_size": 50,
    "crop_scale": None,
}  # fmt: skip


def cosine(start, end, share):
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def choice(path):
    """What ``probe --model PATH`` asks for."""
    return SimpleNamespace(model=str(path), arch=None, model_kwargs={}, img_size=None, pretrained=True, final_norm=True)


def test_a_run_logs_its_schedules_and_the_teacher_is_what_is_probed(tiny):
    config = tiny(**SETTINGS, epochs=2, warmup_teacher_temp_epochs=2, teacher_temp=0.07)
    initial = Run(config).model.head.last_layer.weight_v.clone()
    result = pretrain(config)
    entries = read_entries(result.output / "metrics.jsonl")
    for entry in entries:
        share = (entry["step"] - 1) / 12
        assert entry["momentum"] == pytest.approx(cosine(0.996, 1, share))
        assert entry["weight_decay"] == pytest.approx(cosine(0.04, 0.4, share))
        assert entry["teacher_temp"] == (0.04 if entry["step"] <= 6 else 0.07)
        assert 0 < entry["teacher_entropy"] < math.log(24) and 0 < entry["feature_std"] < 1
        assert entry["loss"] > entry["teacher_entropy"]  # by their divergence
    assert entries[-1]["val_loss"] > 0
    text = (result.output / "report.html").read_text()
    assert (
        "is the entropy of the teacher" in text
        and "The teacher&#39;s encoder is what probe and analyze read" in text
        and "Reconstructions" not in text
    )

    exported = torch.load(result.output / "dino_checkpoint.pth", weights_only=True)
    assert set(exported) == {"student", "teacher", "dino_loss"}
    saved = load(result.output / "checkpoints" / "final.pt")
    assert torch.equal(saved["model"]["center"], exported["dino_loss"]["center"]) and saved["model"]["center"].any()
    assert not torch.equal(saved["model"]["head.last_layer.weight_v"], initial)
    run = load_encoder(choice(result.output))
    alone = load_encoder(choice(result.output / "dino_checkpoint.pth"))
    assert run.fingerprint() == alone.fingerprint()
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, exported["teacher"][f"backbone.{name}"]), name
    assert not torch.equal(exported["teacher"]["backbone.cls_token"], exported["student"]["module.backbone.cls_token"])


def test_a_verdict_takes_the_loss_apart_and_names_a_collapse(tiny):
    config, before = tiny(**SETTINGS), {"loss": 3.0, "teacher_entropy": 1.0}
    text = METHODS["dino"].verdict(config, before, {"loss": 2.5, "teacher_entropy": 2.25})
    assert "2.25 is the entropy" in text and "0.25 the student's distance from it; 1 and 2 before" in text
    assert "collapsed" not in text
    most = math.log(24)
    assert "collapsed" in METHODS["dino"].verdict(config, before, {"loss": most, "teacher_entropy": most})


def test_the_last_layer_stays_as_it_is_in_the_first_epoch(tiny):
    config = tiny(**SETTINGS)
    before = {name: value.clone() for name, value in Run(config).model.state_dict().items()}
    after = load(pretrain(config).output / "checkpoints" / "final.pt")["model"]
    assert torch.equal(after["head.last_layer.weight_v"], before["head.last_layer.weight_v"])
    assert not torch.equal(after["head.mlp.4.weight"], before["head.mlp.4.weight"])


def test_a_run_continues_with_the_same_bits_teacher_and_centre_included(tiny, tmp_path, monkeypatch):
    changes = {**SETTINGS, "epochs": 2, "accum_steps": 2, "batch_size": 25, "workers": 1, "val_every": 0.0}
    whole = pretrain(tiny(**changes, output=str(tmp_path / "whole"))).output
    with monkeypatch.context() as patch:
        stop_after(7, patch)
        assert pretrain(tiny(**changes, output=str(tmp_path / "parts"))).stopped_by
    pretrain(tiny(**changes, output=str(tmp_path / "parts")), resume="auto")
    a, b = (load(folder / "checkpoints" / "final.pt") for folder in (whole, tmp_path / "parts"))
    for key in ("model", "optimizer"):
        assert_same_bits(a[key], b[key], key)
    trained = {name for group in a["optimizer"]["param_groups"] for name in group["params"]}
    assert "encoder.pos_embed" in trained
    assert not any(name.startswith("teacher.") or name.endswith("weight_g") for name in trained)
    assert losses(whole) == losses(tmp_path / "parts")


def test_gradients_are_clipped_parameter_by_parameter(tiny, monkeypatch):
    norms = []

    def see(model, scheduled, at):
        norms.append([p.grad.norm().item() for p in model.parameters() if p.grad is not None])

    def clip(value):
        norms.clear()
        monkeypatch.setattr(METHODS["dino"], "before_update", staticmethod(see))
        pretrain(tiny(**{**SETTINGS, "batch_size": 200, "clip_grad": value}), overwrite=True)
        return torch.tensor(norms[0])

    free, clipped = clip(1e6), clip(0.1)
    assert (free > 0.1).sum() > 1 and (free < 0.1).sum() > 1
    torch.testing.assert_close(clipped, free.clamp(max=0.1), rtol=1e-3, atol=1e-6)


def test_the_temperature_of_the_teacher_rises_by_equal_steps(tiny):
    config = tiny(**SETTINGS, epochs=6, warmup_teacher_temp_epochs=4, teacher_temp=0.07)
    temps = [METHODS["dino"].schedule(config, Moment(step, 60, 10))["teacher_temp"] for step in (0, 9, 10, 25, 39, 59)]
    assert temps == pytest.approx([0.04, 0.04, 0.05, 0.06, 0.07, 0.07])


@pytest.mark.parametrize(
    ("changes", "size"), [({}, 96), ({"img_size": 28, "patch_size": 4}, 12), ({"model": "vit_huge_patch14_224"}, 98)]
)
def test_local_views_are_whole_patches_by_default(tiny, changes, size):
    from mimkernels.commands.pretrain.methods.dino import local_size

    config = tiny(**{"img_size": 224, "patch_size": None, **changes})
    assert local_size(config) == size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 0.5}, "mask_ratio is an option of MAE and SimMIM"),
        ({"local_size": 10}, "local_size 10 is not divisible by the patches' 4 pixels: try 8"),
        ({"local_scale": 0.5}, "got 0.5 and 0.4"),
        ({"warmup_teacher_temp_epochs": 2}, r"warmup_teacher_temp_epochs must be in 0..1 \(epochs\), got 2"),
        ({"weight_decay": 0.0}, "cannot rise from 0 to weight_decay_end 0.4"),
        ({"teacher_temp": 0.0}, "teacher_temp must be positive"),
        ({"prototypes": 0}, "prototypes must be at least 1"),
        ({"local_crops": -1}, "local_crops must be 0 or more"),
    ],
)
def test_what_a_dino_run_cannot_do_is_refused(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        Run(tiny(**{**SETTINGS, **changes}))
