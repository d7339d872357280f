"""MoCo v3 as a method of ``mimkernels pretrain``."""

import math

import pytest
import torch

from mimkernels.commands.pretrain.run import Run, pretrain
from mimkernels.engine.checkpoint import load
from mimkernels.engine.encoder import load_encoder
from mimkernels.engine.training.history import read_entries
from tests.commands.pretrain.test_run import assert_same_bits, losses, stop_after

MOCO = {
    "method": "mocov3", "decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16, "mlp_dim": 32, "out_dim": 8,
    "val_split": 0.8,  # trains on about 300 images
    "crop_scale": None,
}  # fmt: skip


class Choice:
    """What ``probe --model PATH`` asks for."""

    img_size, arch, pretrained, final_norm = None, None, True, True
    model_kwargs: dict = {}  # noqa: RUF012

    def __init__(self, model):
        self.model = str(model)


def test_a_run_logs_its_momentum_and_its_weights_are_read_by_probe(tiny):
    result = pretrain(tiny(**MOCO, batch_size=50, epochs=2, val_images=70))
    entries = read_entries(result.output / "metrics.jsonl")
    for entry in entries:
        done = (entry["step"] - 1) / result.total_steps  # the momentum of a step is known before it
        assert entry["momentum"] == pytest.approx(1 - 0.01 * (math.cos(math.pi * done) + 1) / 2)
        assert 0 < entry["feature_std"] < 1
    assert entries[-1]["val_loss"] > 0
    text = (result.output / "report.html").read_text()
    assert "finding an image&#39;s other view" in text and "spread of the features" in text
    assert "finding all images of the batch equally similar" in text and "Reconstructions" not in text
    # Two directions over 50 images and over the 20 that are left.
    chance = 4 * 0.2 * (50 * math.log(50) + 20 * math.log(20)) / 70
    blind = dict(result.content.comparisons)["finding all images of the batch equally similar, on new images"]
    assert float(blind) == pytest.approx(chance, rel=1e-3)

    exported = torch.load(result.output / "mocov3_checkpoint.pth", weights_only=True)["state_dict"]
    assert {name.split(".")[1] for name in exported} == {"base_encoder", "momentum_encoder", "predictor"}
    (result.output / "checkpoints" / "final.pt").unlink()
    encoder = load_encoder(Choice(result.output))
    for name, value in encoder.model.state_dict().items():
        assert torch.equal(value, exported[f"module.base_encoder.{name}"]), name


def test_a_run_continues_with_the_same_bits_average_included(tiny, tmp_path, monkeypatch):
    changes = {**MOCO, "epochs": 2, "accum_steps": 2, "batch_size": 50, "workers": 1, "val_every": 0.0}
    whole = pretrain(tiny(**changes, output=str(tmp_path / "whole"))).output
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert pretrain(tiny(**changes, output=str(tmp_path / "parts"))).stopped_by
    pretrain(tiny(**changes, output=str(tmp_path / "parts")), resume="auto")
    a, b = (load(folder / "checkpoints" / "final.pt") for folder in (whole, tmp_path / "parts"))
    assert not torch.equal(a["model"]["momentum_encoder.cls_token"], a["model"]["encoder.cls_token"])
    for key in ("model", "optimizer"):
        assert_same_bits(a[key], b[key], key)
    trained = {name for group in a["optimizer"]["param_groups"] for name in group["params"]}
    assert trained == set(a["optimizer"]["state"])
    assert not any(name.startswith("momentum_") or "patch_embed" in name for name in trained)
    assert losses(whole) == losses(tmp_path / "parts")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 0.5}, "mask_ratio is an option of MAE and SimMIM"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\]"),
        ({"method": "supervised"}, "mlp_dim is an option of MoCo v3"),
    ],
)
def test_what_cannot_work_is_refused(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        Run(tiny(**{**MOCO, **changes}))
