"""``pretrain --target`` given several times: a weighted sum of targets, each with its own head and its own loss."""

import argparse
import io
import itertools
from pathlib import Path

import pytest

from mimkernels.commands.pretrain.cli import add_parser
from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.run import pretrain
from mimkernels.engine.checkpoint import load
from mimkernels.engine.encoder import FrozenEncoder
from mimkernels.engine.settings import given_arguments
from mimkernels.engine.training.history import read_entries
from tests.commands.pretrain.test_feature_teachers import SWIN, VIT
from tests.commands.pretrain.test_features import DENSE, OTHERS, QUICK
from tests.commands.pretrain.test_run import assert_same_bits, losses, stop_after

SUM = f"pixels + 0.5*features:{VIT}"


def test_each_loss_is_logged_shown_and_summed(tiny):
    stream = io.StringIO()
    result = pretrain(tiny(**DENSE, target=SUM, masking="block"), stream=stream)
    entries = read_entries(result.output / "metrics.jsonl")
    for entry, before in itertools.product(entries, ("", "val_")):
        if f"{before}loss" in entry:
            parts = entry[f"{before}loss_pixels"] + 0.5 * entry[f"{before}loss_features"]
            assert entry[f"{before}loss"] == pytest.approx(parts, rel=1e-5)
    assert "val_loss_features" in entries[-1]
    assert f"loss pixels {entries[-1]['loss_pixels']:.4f}" in stream.getvalue()
    page = result.report.read_text()
    assert "weighted sum of 2 losses" in page and "0.5 times features, the smooth L1 loss" in page
    now = result.content.references.now
    assert ("the trained model, on new images, features alone", f"{now['loss_features']:.4g}") in (
        result.content.comparisons
    )
    assert result.content.references.blind is None and len(result.content.cards) == 1
    assert result.content.run_facts["Target"].startswith("1 * (pixels) + 0.5 * (features of vit_tiny")
    assert {"masked_patch_loss", "masked_feature_loss"} <= result.content.backends.keys()
    final = load(result.output / "checkpoints" / "final.pt")
    assert final["config"]["target"] == SUM and final["config"]["target_dim"] == 24
    assert [final["model"][f"decoders.{place}.weight"].shape[0] for place in (0, 1)] == [16, 24]
    assert list(final["teachers"]) == ["features target"]


@pytest.mark.parametrize("method", ["mae", "simmim"])
def test_a_run_with_several_teachers_goes_on_bit_for_bit_and_with_those_alone(tiny, tmp_path, monkeypatch, method):
    own = DENSE if method == "simmim" else QUICK
    settings = {**own, "pictures": 0, "batch_size": 500, "momentum": 0.5, "masking": "block"}
    settings["target"] = f"features:{VIT} + 0.5*ema:layers=1 + 2*features:{SWIN}"
    whole = pretrain(tiny(**settings, output=str(tmp_path / "whole"))).output
    part = tiny(**settings, output=str(tmp_path / "part"))
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert pretrain(part).stopped_by
    for teacher, named in ((0, "features"), (1, "features_2")):
        asked = itertools.count()
        fingerprint = FrozenEncoder.fingerprint

        def other(self, teacher=teacher, asked=asked, fingerprint=fingerprint):
            return "another" if next(asked) == teacher else fingerprint(self)

        with monkeypatch.context() as patch:
            patch.setattr(FrozenEncoder, "fingerprint", other)
            with pytest.raises(ValueError, match=f"the {named} target's teacher is not that of the checkpoint"):
                pretrain(part, resume="auto")
    pretrain(part, resume="auto")
    assert losses(tmp_path / "part") == losses(whole)
    one, other = (load(folder / "checkpoints" / "final.pt") for folder in (whole, tmp_path / "part"))
    assert one["config"]["target_dim"] == [24, None, 16]
    assert_same_bits(one["model"], other["model"])
    assert_same_bits(one["target_teacher"], other["target_teacher"])


def test_the_option_is_given_once_for_each_target():
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["pretrain", "--target", "pixels", "--target", "0.5*ema:layers=4"])
    assert given_arguments(args, PretrainConfig) == {"target": "pixels + 0.5*ema:layers=4"}
    args = parser.parse_args(["pretrain", "--target", "ema"])
    assert given_arguments(args, PretrainConfig) == {"target": "ema"}


def test_a_checkpoint_alone_fetches_no_teacher_of_a_sum():
    saved = PretrainConfig(method="simmim", target="pixels + 2*features:hf-hub:someone/model").to_dict()
    with pytest.raises(ValueError, match="names a teacher that is fetched, target 'pixels .*someone/model'"):
        PretrainConfig.continued(saved, {})
    assert PretrainConfig.continued(saved, {"target": "pixels"}).target == "pixels"


def test_widths_of_several_teachers_are_settings():
    widths = [24, None, 8]
    assert PretrainConfig.from_dict({"target_dim": widths}).target_dim == widths
    for wrong in ("a", [1.5], {"a": 1}):
        with pytest.raises(ValueError, match="setting 'target_dim' must be"):
            PretrainConfig.from_dict({"target_dim": wrong})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**DENSE, "target": "pixels + 0*ema"}, r"a weight must be a positive number .* got '0\*ema'"),
        ({**DENSE, "target": "ema + ema:layers=1"}, "both keep a copy of the trained encoder"),
        ({**DENSE, "target": "pixels + ema:tokens=all", "masking": "none"}, "masking none leaves no masked token"),
        ({**DENSE, "target": "ema + features:x", "loss": "mse"}, r"loss is that of pixels, got 'mse'"),
        ({**DENSE, "target": "pixels + features:x", "momentum": 0.9}, "momentum is that of target ema"),
        ({**DENSE, "target": f"{SUM} + ema", "target_dim": 8}, "one width for each target .* has 2, got 8"),
        ({**DENSE, "target": SUM, "target_dim": 8}, "target_dim is 8, features of vit_tiny.* have 24"),
        ({**QUICK, "target": "pixels + patch-norm"}, "target of mae must be pixels, features:MODEL, ema or bootstrap"),
        ({**QUICK, **OTHERS, "method": "mocov3", "target": SUM}, "target is an option of MAE and SimMIM"),
    ],
)
def test_what_cannot_be_summed_is_refused(tiny, settings, message):
    config = tiny(**settings)
    with pytest.raises(ValueError, match=message):
        pretrain(config)
    assert not Path(config.output).exists()
