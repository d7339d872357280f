"""``pretrain --masking``: every strategy for images, drawn by the seed and the step, shown in the report."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mimkernels.commands.pretrain.config import MASKINGS
from mimkernels.commands.pretrain.masking import Masking
from mimkernels.commands.pretrain.run import pretrain
from mimkernels.data.masks import STRATEGIES, MaskSampler
from mimkernels.engine.checkpoint import load
from mimkernels.models import MAE, SimMIM
from tests.commands.pretrain.test_run import assert_same_bits, losses, stop_after

# 14 x 14 patches of one pixel, which has no variance to be normalised by; 2 steps per epoch
GRID = SimpleNamespace(grid_size=(14, 14))  # all that strategies without a teacher know of a model
LARGER = {"img_size": 14, "patch_size": 1, "norm_pix_loss": False, "batch_size": 750}


def test_every_strategy_that_a_run_can_draw_is_offered():
    assert list(MASKINGS) == [name for name, kind in STRATEGIES.items() if kind.dims == 2]


@pytest.mark.parametrize("name", ["random", "unit", "block_exact", "ibot", "multiblock"])
def test_a_run_with_strategies_of_every_kind(tiny, name, monkeypatch):
    given = []
    forward = MAE.forward

    def seen(self, images, **arguments):
        if self.training:  # a validation gives masks of its own
            given.append(arguments)
        return forward(self, images, **arguments)

    monkeypatch.setattr(MAE, "forward", seen)
    config = tiny(**LARGER, masking=name, pictures=1)
    result = pretrain(config)
    assert len(losses(result.output)) == 2 and result.content.held_out_loss is not None
    text = (result.output / "report.html").read_text()
    assert f"learns to paint the other {result.content.masked_share:.0%}" in text
    if name == "random":
        assert all(arguments.get("mask") is None for arguments in given) and result.content.masked_share == 0.75
        return
    assert f"{name}, " in result.content.run_facts["Masks"]
    for step, arguments in enumerate(given[:2]):
        assert torch.equal(arguments["mask"], MaskSampler((14, 14), name).sample(750, config.seed, step).mask)


@pytest.mark.parametrize("name", ["block_exact", "ibot"])
def test_simmim_takes_every_strategy(tiny, name, monkeypatch):
    given = []
    forward = SimMIM.forward

    def seen(self, images, **arguments):
        given.append(arguments["mask"])
        return forward(self, images, **arguments)

    monkeypatch.setattr(SimMIM, "forward", seen)
    model = {
        "img_size": 28,
        "patch_size": 2,
        "mask_unit": 4,
        "decoder_dim": 512,
        "decoder_depth": 8,
        "decoder_heads": 16,
    }
    config = tiny(**model, method="simmim", masking=name, batch_size=750, head_stats="entropy", pictures=1)
    result = pretrain(config)
    assert len(losses(result.output)) == 2 and result.content.held_out_loss is not None
    assert f"{result.content.masked_share:.0%} of each image's area is hidden" in result.content.lead
    for step, mask in enumerate(given[:2]):
        assert torch.equal(mask, MaskSampler((14, 14), name).sample(750, config.seed, step).mask)


def test_ratio_and_options_go_to_the_strategy(tiny):
    config = tiny(**LARGER, masking="block_exact", masking_kwargs={"count": 75, "min_patches": 9, "aspect": [0.5, 2]})
    masking = Masking(config, GRID)
    expected = MaskSampler((14, 14), "block_exact", count=75, min_patches=9, aspect=[0.5, 2]).sample(9, config.seed, 4)
    assert torch.equal(masking.arguments(torch.zeros(9), 4)["mask"], expected.mask)
    assert masking.share == pytest.approx(75 / 196)
    assert masking.told() == "block_exact (count 75, min_patches 9, aspect [0.5, 2]), 38% of the patches on average"
    assert Masking(tiny(masking="block", mask_ratio=0.25), GRID).arguments(torch.zeros(99), 0)["mask"].sum() <= 99 * 49
    counted = Masking(tiny(masking_kwargs={"count": 100}), GRID).arguments(torch.zeros(3), 0)["mask"]
    assert counted.flatten(1).sum(1).tolist() == [100] * 3


def test_a_run_with_ragged_masks_continues_with_the_same_bits(tiny, tmp_path, monkeypatch):
    settings = {"masking": "ibot", "masking_kwargs": {"min_patches": 1}, "epochs": 2, "batch_size": 500}
    whole = pretrain(tiny(**settings, output=str(tmp_path / "whole"))).output
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        part = tiny(**settings, output=str(tmp_path / "part"))
        assert pretrain(part).stopped_by
    pretrain(part, resume="auto")
    assert losses(whole) == losses(tmp_path / "part")
    states = [load(next((tmp_path / name / "checkpoints").glob("*final*")))["model"] for name in ("whole", "part")]
    assert_same_bits(*states)


def test_batches_of_which_nothing_is_masked_are_drawn_again(tiny):
    """A batch of one image, whose ratio is 0 half of the time."""
    masking = Masking(tiny(masking="ibot", batch_size=1), GRID)
    masks = [masking.arguments(torch.zeros(1), step)["mask"] for step in range(64)]
    assert all(mask.any() for mask in masks) and len({mask.numpy().tobytes() for mask in masks}) > 60
    assert masking.for_held_out(torch.zeros(1)).any()


def test_images_that_are_masked_come_first_in_the_report(tiny):
    mask = Masking(tiny(masking="dinov2", batch_size=64), GRID).for_held_out(torch.zeros(12))
    assert mask.shape == (12, 14, 14) and mask.flatten(1).any(1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masking": "blocks"}, "masking must be one of random, unit, .* got blocks"),
        ({"masking": "unit", "masking_kwargs": {"unit": 3}}, "a unit of 3 x 3 patches does not divide a grid of 4 x 4"),
        ({"masking": "block", "masking_kwargs": {"area": 3}}, "block has no option area; its options: min_patches"),
        ({"masking": "block", "masking_kwargs": {"ratio": 0.5}}, "takes options of the strategy, got ratio"),
        ({"masking": "multiblock"}, "multiblock: a grid of 4 x 4 patches is too small"),
        ({"masking": "dinov2", "mask_ratio": 0.5}, r"dinov2 takes no ratio \(got 0.5\)"),
        ({"masking": "dinov2", "batch_size": 1}, "none of 100 draws masks a patch of a batch of 1"),
        ({"masking": "ibot", "head_stats": "entropy"}, "'ibot' leaves images different numbers of patches"),
        ({"masking": "block", "regularize": {"entropy": 1e-3}}, "'block' leaves images different numbers of patches"),
    ],
)
def test_what_a_run_cannot_mask_is_refused_before_anything_is_written(tiny, settings, message):
    config = tiny(**settings)
    with pytest.raises(ValueError, match=message):
        pretrain(config)
    assert not Path(config.output).exists()


def test_a_compiled_run_takes_masks_of_different_counts(tiny):
    plain = pretrain(tiny(**LARGER, masking="block")).output
    compiled = pretrain(tiny(**LARGER, masking="block", compile=True), overwrite=True).output
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
