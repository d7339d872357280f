"""What every strategy promises, whoever draws it; what is refused."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mimkernels import random_mask
from mimkernels.data.masks import STRATEGIES, MaskSampler, native

HOST = [name for name, kind in STRATEGIES.items() if not kind.on_device]
SHARED = ("dinov2", "multiblock", "multiblock3d")  # by the images of a batch
DRAWN = [name for name, kind in STRATEGIES.items() if not kind.needs_scores]
OPTIONS = {
    "block": {"count": 75, "max_patches": 40},
    "inverse_block": {"predict": 0.05},
    "multiblock": {"targets": 3},
    "multiblock3d": {"blocks": 3, "temporal_scale": (0.3, 0.8), "max_keep": 700},
}


def sampler(name: str, **arguments) -> MaskSampler:
    grid = (6, 14, 14) if STRATEGIES[name].dims == 3 else (14, 14)
    return MaskSampler(grid, name, **{**OPTIONS.get(name, {}), **arguments})


def parts(masks) -> dict[str, torch.Tensor]:
    tensors = {name: getattr(masks, name) for name in ("mask", "context", "targets", "predict")}
    tensors |= masks.tokens._asdict() if masks.tokens is not None else {}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def assert_equal(one, other):
    assert parts(one).keys() == parts(other).keys()
    for name, tensor in parts(one).items():
        assert tensor.dtype == parts(other)[name].dtype and torch.equal(tensor, parts(other)[name]), name


@pytest.mark.parametrize("name", HOST)
def test_the_module_draws_what_python_draws(name):
    assert native.module() is not None, native.state().reason
    for seed, offset, batch in ((0, 0, 40), (2**63 - 1, 2**40 + 3, [2**32 - 1, 0, 7]), (5, 1, [])):
        drawn = [sampler(name, backend=backend).sample(batch, seed, offset) for backend in ("cpu", "reference")]
        assert_equal(*drawn)


@pytest.mark.parametrize(
    "published", [{"truncate": "first", "last_row": False}, {"overlap": True}, {"min_keep": 80, "scale": (0.5, 0.6)}]
)
def test_the_module_draws_what_python_draws_with_other_options(published):
    """The last of them runs out of places for a context, time and again."""
    assert_equal(*[sampler("multiblock", backend=b, **published).sample(60, 1) for b in ("cpu", "reference")])


class Samples(Dataset):
    def __init__(self, sampler: MaskSampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return 40

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int, torch.Tensor]:
        epoch, index = key
        return epoch, index, self.sampler.sample([index], 3, epoch).mask[0]

    def collate(self, samples: list) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks drawn one by one, and for the batch."""
        epochs, indices, masks = zip(*samples, strict=True)
        return torch.stack(masks), self.sampler.sample(indices, 3, epochs[0]).mask


@pytest.mark.parametrize("name", DRAWN)
def test_masks_are_the_same_for_any_number_of_workers(name):
    data = Samples(sampler(name))
    batches = [[(epoch, index) for index in range(first, first + 5)] for epoch in (0, 1) for first in range(0, 40, 5)]
    for batch in batches[::2]:
        batch.reverse()

    def drawn(workers: int) -> list:
        loader = DataLoader(data, batch_sampler=batches, collate_fn=data.collate, num_workers=workers)
        return list(loader)

    alone = drawn(0)
    for one_by_one, together in alone:
        assert name in SHARED or torch.equal(one_by_one, together)
    assert len({mask.numpy().tobytes() for _, together in alone for mask in together}) > 30, "most samples differ"
    for workers in (1, 4):
        for one, other in zip(alone, drawn(workers), strict=True):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("name", HOST)
def test_threads_draw_the_same(name):
    drawing = sampler(name)
    with ThreadPoolExecutor(4) as pool:
        for masks in pool.map(lambda _: drawing.sample(64, 3, 1), range(8)):
            assert_equal(masks, drawing.sample(64, 3, 1))


def test_other_threads_run_while_masks_are_drawn():
    options = sampler("block_exact")._strategy.options
    samples = np.arange(200_000, dtype=np.uint32)
    picks, targets = np.zeros(len(samples), dtype=np.int32), [(78.0, 78.0)]
    blocks = native.module().blocks
    drawing = threading.Event()

    def draw() -> None:
        drawing.set()
        blocks(samples, 0, 0, grid=(14, 14), targets=targets, picks=picks, whole=True, exact=True, **options)
        drawing.clear()

    thread = threading.Thread(target=draw)
    thread.start()
    # One step may fall between the event and the call; further ones are during it.
    steps = 0
    while thread.is_alive():
        steps += drawing.is_set()
        time.sleep(0.001)
    assert steps > 3


@pytest.mark.parametrize("name", DRAWN)
def test_seed_offset_sample_and_stream_change_the_masks(name):
    drawing, first = sampler(name), sampler(name).sample(8, 1, 2).mask
    assert torch.equal(first, drawing.sample(range(8), 1, 2).mask)
    for other in (drawing.sample(8, 2, 2), drawing.sample(8, 1, 3), drawing.sample(range(8, 16), 1, 2)):
        assert not torch.equal(first, other.mask)
    assert not torch.equal(first, sampler(name, stream=1).sample(8, 1, 2).mask)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_ids_context_and_targets_say_what_the_mask_says(name):
    drawing = sampler(name)
    scores = {"scores": torch.rand(9, 196)} if drawing.needs_scores else {}
    masks = drawing.sample(9, 0, 4, **scores)
    flat = masks.mask.flatten(1)
    assert masks.mask.dtype == torch.bool and masks.mask.shape == (9, *drawing.grid)
    counts = flat.sum(1)
    assert (masks.tokens is not None) == (len(counts.unique()) == 1) == (not drawing.ragged)
    for ragged, chosen in ((masks.masked(), flat), (masks.visible(), ~flat)):
        assert torch.equal(ragged.ids, chosen.flatten().nonzero()[:, 0])
        assert ragged.offsets.diff().tolist() == chosen.sum(1).tolist()
    for image in range(9):
        weights = masks.weights()[masks.masked().offsets[image] : masks.masked().offsets[image + 1]]
        assert len(weights) == 0 or torch.isclose(weights.sum(), torch.ones(()))
    if masks.tokens is not None:
        ids_keep, ids_masked, ids_restore, mask = masks.tokens
        assert torch.equal(mask.bool(), flat) and mask.dtype == torch.float32
        assert not flat.gather(1, ids_keep).any() and flat.gather(1, ids_masked).all()
        order = torch.cat([ids_keep, ids_masked], 1)
        assert torch.equal(order.gather(1, ids_restore), torch.arange(flat.shape[1]).expand(9, -1))
    if masks.context is not None:
        assert torch.equal(masks.context, (~flat).nonzero()[:, 1].view(9, -1))
        seen = torch.zeros_like(flat).scatter(1, masks.context, True)
        assert not seen.gather(1, masks.targets.flatten(1)).any() or name == "multiblock", "dropped constraints"
    if masks.predict is not None:
        assert flat.gather(1, masks.predict).all() and (masks.predict.diff(dim=1) > 0).all()


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_empty_batches(name):
    drawing = sampler(name)
    scores = {"scores": torch.rand(0, 196)} if drawing.needs_scores else {}
    masks = drawing.sample(0, 0, **scores)
    assert masks.mask.shape == (0, *drawing.grid) and len(masks.masked().ids) == 0
    assert masks.tokens.ids_keep.shape[0] == 0 and masks.masked().offsets.tolist() == [0]


def test_random_is_random_mask():
    masks = MaskSampler((6, 5), "random", ratio=0.7).sample(4, 3, 9)
    expected = random_mask(4, 30, 9, 3, 9)
    assert all(torch.equal(a, b) for a, b in zip(masks.tokens, expected, strict=True))
    step = MaskSampler((6, 5), "random", ratio=0.7).sample(4, 3, torch.tensor(9))
    assert torch.equal(step.mask, masks.mask)
    numbered = MaskSampler((6, 5), "random", ratio=0.7).sample([2, 0], 3, 9)
    assert torch.equal(numbered.tokens.ids_restore, masks.tokens.ids_restore[[2, 0]])


@pytest.mark.parametrize("name", ["unit", "uniform", "tube"])
def test_strategies_of_regular_shape_take_an_offset_on_the_device(name):
    drawing = sampler(name)
    assert torch.equal(drawing.sample(5, 3, torch.tensor(8)).mask, drawing.sample(5, 3, 8).mask)


def test_attention_guided_masks_the_highest_scores():
    scores = torch.rand(5, 30)
    masks = MaskSampler((5, 6), "attention_guided", count=11).sample(5, 0, scores=scores)
    for flat, row in zip(masks.mask.flatten(1), scores, strict=True):
        assert flat.sum() == 11 and row[flat].min() > row[~flat].max()


def test_scores_that_are_no_numbers_are_refused_and_infinite_ones_ordered():
    sampler = MaskSampler((2, 3), "attention_guided", count=2)
    scores = torch.tensor([[0.1, 0.2, math.inf, 0.4, -math.inf, 0.3]] * 3)
    masked = sampler.sample(3, 0, scores=scores).mask.flatten(1).int()
    assert masked.tolist() == [[0, 0, 1, 1, 0, 0]] * 3
    scores[1, 4] = math.nan
    with pytest.raises(ValueError, match="scores that are numbers, got NaN for 1 of 3 images, the first at 1"):
        sampler.sample(3, 0, scores=scores)


def test_units_of_pixels():
    """SimMIM's figures: 22 of 36 units at 192 pixels, 30 of 49 at 224."""
    for size, patch, masked in ((192, 4, 22), (224, 16, 30)):
        masks = MaskSampler.for_images(size, patch, "unit", mask_unit=32).sample(3, 0).mask
        units = (
            masks.unflatten(1, (size // 32, 32 // patch)).unflatten(3, (size // 32, 32 // patch)).float().mean((2, 4))
        )
        assert set(units.unique().tolist()) == {0.0, 1.0} and units.sum((1, 2)).tolist() == [masked] * 3


def test_groups_of_blocks_are_streams():
    first, second = (MaskSampler((4, 8, 8), "multiblock3d", scale=(0.3, 0.3), blocks=2, stream=i) for i in (0, 1))
    assert not torch.equal(first.sample(4, 0).mask, second.sample(4, 0).mask)


def test_complements_and_the_inverse_of_multiblock3d():
    arguments = {"blocks": 3, "scale": (0.2, 0.2)}
    plain, full = (
        MaskSampler((4, 8, 8), "multiblock3d", complement=c, **arguments).sample(6, 0) for c in (None, "context")
    )
    assert torch.equal(full.context, plain.context)
    assert full.context.shape[1] + full.targets.shape[2] == 256
    other = MaskSampler((4, 8, 8), "multiblock3d", complement="targets", **arguments).sample(6, 0)
    assert torch.equal(other.targets, plain.targets) and other.context.shape[1] + other.targets.shape[2] == 256
    inverse = MaskSampler((4, 8, 8), "multiblock3d", inverse=True, **arguments).sample(6, 0)
    assert torch.equal(inverse.context, plain.targets[:, 0]) and torch.equal(inverse.targets[:, 0], plain.context)
    half = MaskSampler((4, 8, 8), "multiblock3d", context_frames=0.5, **arguments).sample(6, 0)
    assert half.mask[:, 2:].all() and not half.mask[:, :2].all()


@pytest.mark.parametrize("name", [name for name in STRATEGIES if STRATEGIES[name].dims == 2])
def test_a_grid_of_one_patch_is_refused_with_its_size(name):
    with pytest.raises(ValueError, match=rf"{name}: .*(1 x 1|1 patch)"):
        MaskSampler((1, 1), name)


@pytest.mark.parametrize("name", ["tube", "multiblock3d"])
def test_a_video_of_one_patch_is_refused_with_its_size(name):
    with pytest.raises(ValueError, match=rf"{name}: .*1 x 1"):
        MaskSampler((1, 1, 1), name)


@pytest.mark.parametrize(
    "grid, strategy, arguments, message",
    [
        ((14, 14), "blocks", {}, "strategy must be one of random, unit, .* got 'blocks'"),
        ((14, 14), "block", {"unit": 2}, "block has no option unit; its options: min_patches, max_patches, aspect"),
        ((14, 14), "random", {"min": 2}, "random has no option min; its options: none"),
        ((14, 14), "tube", {}, r"tube takes a grid of \(frames, height, width\), got \(14, 14\)"),
        ((2, 14, 14), "block", {}, r"block takes a grid of \(height, width\), got \(2, 14, 14\)"),
        ((14, 0), "block", {}, r"grid must be sides from 1 to 32768 patches, got \(14, 0\)"),
        ((14, 14), "random", {"ratio": 1.0}, "ratio must lie between 0 and 1, both excluded, got 1.0"),
        ((14, 14), "random", {"ratio": float("nan")}, "ratio must lie between 0 and 1, .* got nan"),
        ((2, 2), "random", {"ratio": 0.99}, "ratio 0.99 masks all of the 4 patches of a grid of 2 x 2; .* 1 to 3"),
        ((14, 14), "block", {"count": 196}, "count 196 masks all of the 196 patches of a grid of 14 x 14"),
        ((14, 14), "block", {"count": 0}, "count 0 masks none of the 196 patches"),
        ((14, 14), "block", {"count": 7.5}, "count 7.5 masks no number of the 196 patches"),
        ((14, 14), "block", {"count": 75, "ratio": 0.4}, "give ratio or count, got ratio 0.4 and count 75"),
        ((14, 14), "unit", {"unit": 3}, "a unit of 3 x 3 patches does not divide a grid of 14 x 14 patches"),
        ((14, 14), "unit", {"count": 75}, "count 75 is no multiple of the 4 patches of a unit of 2 x 2"),
        ((14, 14), "unit", {"count": 120.0}, "count 120.0 masks no number of the 196 patches of a grid of 14 x 14"),
        ((14, 14), "unit", {"count": 196}, "count 196 masks all of the 196 patches of a grid of 14 x 14"),
        ((14, 14), "unit", {"ratio": 0.5, "count": 98.0}, "give ratio or count, got ratio 0.5 and count 98.0"),
        ((4, 4), "unit", {"unit": 2, "ratio": 0.9}, "ratio 0.9 masks all of the 4 units of 2 x 2 in a grid of 4 x 4"),
        ((4, 4), "unit", {"unit": 4}, "masks all of the 1 units of 4 x 4 in a grid of 4 x 4"),
        ((7, 14), "uniform", {}, "cells of 2 x 2 patches do not divide a grid of 7 x 14"),
        ((14, 14), "uniform", {"ratio": 0.5}, "masks 3 of 4 patches, 147 of 196, not ratio 0.5"),
        ((4, 8, 8), "tube", {"count": 30}, "count 30 is no multiple of the 4 frames of a grid of 4 x 8 x 8"),
        ((14, 14), "block", {"count": 10, "min_patches": 16}, "min_patches 16 is more than the 10 patches to mask"),
        ((1, 14), "block", {}, "a grid of 1 x 14 patches is too small: no rectangle of 1 to 6 patches, 0.3 to 3.33"),
        ((3, 3), "block", {"count": 8, "min_patches": 7}, "a grid of 3 x 3 patches is too small: no rectangle of 7"),
        ((14, 14), "block", {"aspect": (3, 0.3)}, r"aspect must be ascending in \[0.001, 1000\], got \(3, 0.3\)"),
        ((14, 14), "block", {"aspect": 3}, r"aspect must be two numbers, \(low, high\), got 3"),
        ((14, 14), "block", {"max_patches": 0}, "max_patches must be an integer of at least 1, got 0"),
        ((14, 14), "dinov2", {"ratio": 0.5}, r"dinov2 takes no ratio \(got 0.5\)"),
        ((14, 14), "dinov2", {"share": 0}, r"share must lie in \(0, 1\], got 0"),
        ((14, 14), "dinov2", {"ratios": (0.1, 1.0)}, "mask up to all of the 196 patches"),
        ((14, 14), "ibot", {"ratios": [(0.3, 0.4)]}, "ratio 0.3 ± 0.4 leaves"),
        ((14, 14), "ibot", {"ratios": [(0, 0)]}, "mask up to none of the 196 patches"),
        ((2, 50), "inverse_block", {"ratio": 0.5}, "a rectangle of the 50 visible patches, 0.5 to 2 times as high"),
        ((14, 14), "inverse_block", {"predict": 0.001}, "leaves one of the 128 masked patches, got 0.001"),
        ((14, 14), "inverse_block", {"corner": "first"}, "corner must be one of any, last, got 'first'"),
        ((14, 14), "inverse_block", {"roll": 1}, "roll must be true or false, got 1"),
        ((14, 14), "multiblock", {"count": 40}, r"multiblock takes no count \(got 40\)"),
        ((4, 4), "multiblock", {}, "4 x 4 patches is too small: a target block .* can be .* patches, and must have "
         "more than min_keep 10"),
        ((8, 8), "multiblock", {"min_keep": 20}, "a target block of 0.15 to 0.2 of it, .* more than min_keep 20"),
        ((4, 8, 8), "multiblock3d", {"scale": (0.9, 1.0), "aspect": (1, 1)}, "can cover all 4 x 8 x 8 patches"),
        ((4, 8, 8), "multiblock3d", {"complement": "both"}, "complement must be one of context, targets, got 'both'"),
        ((14, 14), "block", {"backend": "cuda"}, "backend must be auto, cpu or reference, got 'cuda'"),
        ((14, 14), "block", {"stream": -1}, "stream must be 0 or more, got -1"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_with_both_sides(grid, strategy, arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskSampler(grid, strategy, **arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((224, 15, "unit"), "patch_size 15 x 15 does not divide img_size 224 x 224"),
        ((224, 16, "unit", 24), "mask_unit 24 is no multiple of patch_size 16 x 16"),
        ((192, 16, "unit", 80), "mask_unit 80 does not divide img_size 192 x 192"),
        ((224, 16, "block", 32), "mask_unit 32 belongs to strategy 'unit', not to 'block'"),
        ((224, 16, "unit", 0), "mask_unit must be a positive integer"),
    ],
)
def test_units_that_do_not_fit_the_image_are_refused(arguments, message):
    size, patch, strategy, *unit = arguments
    with pytest.raises(ValueError, match=message):
        MaskSampler.for_images(size, patch, strategy, mask_unit=unit[0] if unit else None)


@pytest.mark.parametrize(
    "name, call, message",
    [
        ("block", {"batch": -1, "seed": 0}, r"batch must be a number of images in \[0, 2\^32\), got -1"),
        ("block", {"batch": [-1], "seed": 0}, r"sample numbers must lie in \[0, 2\^32\), got -1 to -1"),
        ("block", {"batch": [0.5], "seed": 0}, "batch must be a number of images or a list of sample numbers"),
        ("block", {"batch": 2, "seed": 2**63}, r"seed must be an integer in \[0, 2\^63\)"),
        ("random", {"batch": [1], "seed": 0, "offset": -1}, r"offset must be an integer in \[0, 2\^63\), got -1"),
        (
            "block",
            {"batch": 2, "seed": 0, "offset": torch.tensor(1)},
            "an offset tensor goes with strategies on the device",
        ),
        ("block", {"batch": 2, "seed": 0, "scores": torch.rand(2, 196)}, r"block takes no scores, got \[2, 196\]"),
        ("attention_guided", {"batch": 2, "seed": 0}, r"needs scores \[2, 196\], one per patch, got NoneType"),
        (
            "attention_guided",
            {"batch": 2, "seed": 0, "scores": torch.rand(2, 5)},
            r"needs scores \[2, 196\], .* \[2, 5\]",
        ),
    ],
)
def test_calls_that_do_not_fit_are_refused(name, call, message):
    with pytest.raises(ValueError, match=message):
        MaskSampler((14, 14), name).sample(**call)


def test_blocks_that_always_cover_a_video_end_in_an_error():
    """One block cannot, so that it is not refused; a hundred do."""
    for backend in ("cpu", "reference"):
        drawing = MaskSampler((1, 3, 3), "multiblock3d", blocks=100, scale=(0.5, 0.5), aspect=(1, 1), backend=backend)
        with pytest.raises(RuntimeError, match="sample 0: none of 1000 draws left a patch visible"):
            drawing.sample(1, 0)


def test_without_the_module_python_draws_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(native._native, "FOLDER", tmp_path)
    native._loaded.cache_clear()
    try:
        expected = sampler("block", backend="reference").sample(4, 0)
        assert "never installed" in native.state().reason
        assert_equal(sampler("block").sample(4, 0), expected)
        with pytest.raises(NotImplementedError, match="no native mask samplers: .*never installed"):
            sampler("block", backend="cpu")
        (tmp_path / "mimkernels_masks.cpython-399-x86_64-linux-gnu.so").write_bytes(b"")
        native._loaded.cache_clear()
        assert "built for another Python (mimkernels_masks.cpython-399" in native.state().reason
        native.state().path.write_bytes(b"no library")
        native._loaded.cache_clear()
        assert "does not load" in native.state().reason and native.state().remedy
    finally:
        native._loaded.cache_clear()


def test_direct_calls_of_the_module_stay_inside_their_memory():
    module, samples = native.module(), np.zeros(2, dtype=np.uint32)
    blocks = {
        "grid": (4, 4), "targets": [(5.0, 5.0)], "picks": np.zeros(2, dtype=np.int32), "whole": True,
        "min_patches": 1, "max_patches": 5, "log_aspect": (-1, 1), "exact": True,
    }  # fmt: skip
    assert module.blocks(samples, 0, 0, **blocks).sum() == 10
    for wrong, fact in (
        ({"grid": (0, 4)}, "the sides of a grid are at least 1"),
        ({"grid": (4, 2**20)}, "the sides of a grid are at most 32768"),
        ({"targets": [(5.0, 17.0)]}, "a target is 0 to all patches"),
        ({"targets": [(5.0, float("nan"))]}, "a target is 0 to all patches"),
        ({"picks": np.ones(2, dtype=np.int32)}, "a pick is the number of a target"),
        ({"picks": np.zeros(1, dtype=np.int32)}, "one pick for each sample"),
        ({"log_aspect": (-100, 1)}, "aspect ratios are within"),
        ({"max_patches": 17}, "max_patches is at most all patches"),
    ):
        with pytest.raises(ValueError, match=fact):
            module.blocks(samples, 0, 0, **{**blocks, **wrong})
    with pytest.raises(ValueError, match="a block is smaller than the grid"):
        module.multiblock(samples, 0, 0, grid=(4, 4), target=(4, 2), context=(2, 2), targets=1, min_keep=0,
                          last_row=True, overlap=False)  # fmt: skip
    with pytest.raises(ValueError, match="a block fits the grid"):
        module.multiblock3d(samples, 0, 0, grid=(2, 4, 4), block=(3, 1, 1), blocks=1, context_frames=2, tries=1)
    with pytest.raises(ValueError, match="mask is"):
        module.thin(np.ones((3, 4), dtype=bool), samples, 0, 0, count=1, second=False)
