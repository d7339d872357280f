"""What each strategy draws is distributed as what a plain statement of its algorithm draws.

Seeds are fixed, so that a test gives one answer. Where the two agree, each comparison (there are about a hundred) would
be a false alarm for one seed in 10^6.
"""

import math
import random

import numpy as np
import pytest
from scipy import stats

from mimkernels.data.masks import MaskSampler
from tests.data.masks import plain

ALPHA = 1e-6
GRID = (14, 14)
DRAWS = 3000


def sampled(grid, strategy, draws=DRAWS, **options) -> np.ndarray:
    return MaskSampler(grid, strategy, **options).sample(draws, seed=7, offset=1).mask.numpy()


def stated(make, draws=DRAWS, *arguments, **options) -> np.ndarray:
    rng = random.Random(3)
    return np.stack([make(rng, *arguments, **options) for _ in range(draws)])


def values(masks: np.ndarray) -> dict[str, np.ndarray]:
    """One number of each mask: its count, the log aspect of what it spans, how often it changes between neighbours."""
    planes = masks.reshape(len(masks), -1, *masks.shape[-2:]).any(1)
    rows, columns = (np.maximum(planes.any(axis).sum(1), 1) for axis in (2, 1))
    edges = np.diff(masks, axis=-1).sum(tuple(range(1, masks.ndim))) + np.diff(masks, axis=-2).sum(
        tuple(range(1, masks.ndim))
    )
    return {"count": masks.reshape(len(masks), -1).sum(1), "aspect": np.log(rows / columns), "edges": edges}


def disagreements(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """The tests that say that two sets of independent masks come from two distributions, with what they say."""
    found = {}
    for name, own in values(ours).items():
        other = values(theirs)[name]
        p = homogeneity(own, other)
        if p < ALPHA:
            found[name] = p
    a, b = (masks.reshape(len(masks), -1).astype(float) for masks in (ours, theirs))
    share = np.concatenate([a, b]).mean(0)
    deviation = np.sqrt(share * (1 - share) * (1 / len(a) + 1 / len(b)))
    fixed = deviation == 0
    z = np.abs(a.mean(0) - b.mean(0))[~fixed] / deviation[~fixed]
    if z.size and z.max() > stats.norm.isf(ALPHA / 2 / z.size):  # every patch is a test of its own
        found["frequency"] = z.max()
    return found


def homogeneity(own: np.ndarray, other: np.ndarray) -> float:
    """p of the chi-squared test of equal distributions; neighbours are pooled until 40 are there."""
    levels, numbers = np.unique(np.concatenate([own, other]), return_inverse=True)
    table = np.stack([np.bincount(part, minlength=len(levels)) for part in np.split(numbers, [len(own)])])
    pooled, current = [], np.zeros(2)
    for column in table.T:
        current = current + column
        if current.sum() >= 40:
            pooled.append(current)
            current = np.zeros(2)
    if pooled:
        pooled[-1] = pooled[-1] + current
    return stats.chi2_contingency(np.stack(pooled, 1)).pvalue if len(pooled) > 1 else 1.0


CASES = {
    "random": lambda: (sampled(GRID, "random", ratio=0.75), stated(plain.random_patches, DRAWS, GRID, 49)),
    "random, numbered": lambda: (
        MaskSampler(GRID, "random").sample(range(500, 500 + DRAWS), 7, 1).mask.numpy(),
        stated(plain.random_patches, DRAWS, GRID, 49),
    ),
    "unit": lambda: (sampled(GRID, "unit", unit=2), stated(plain.unit, DRAWS, GRID, 0.6, 2)),
    "uniform": lambda: (sampled(GRID, "uniform"), stated(plain.uniform, DRAWS, GRID)),
    "block": lambda: (
        sampled(GRID, "block", count=75, min_patches=16),
        stated(plain.block, DRAWS, GRID, 75, 16),
    ),
    "block, wide": lambda: (
        sampled((6, 20), "block", count=40, min_patches=4, max_patches=12, aspect=(0.5, 1.5)),
        stated(plain.block, DRAWS, (6, 20), 40, 4, 12, (0.5, 1.5)),
    ),
    "block_exact": lambda: (
        sampled(GRID, "block_exact", count=75, min_patches=16),
        stated(plain.block_exact, DRAWS, GRID, 75, 16),
    ),
    "ibot": lambda: (sampled(GRID, "ibot"), stated(plain.ibot, DRAWS, GRID)),
    "inverse_block, published": lambda: (
        sampled(GRID, "inverse_block", count=127, roll=False, corner="last"),
        stated(plain.inverse_block, DRAWS, GRID, 127, False),
    ),
    "inverse_block, published, rolled": lambda: (
        sampled((9, 16), "inverse_block", count=100, corner="last"),
        stated(plain.inverse_block, DRAWS, (9, 16), 100, True),
    ),
    "tube": lambda: (
        sampled((4, 8, 8), "tube", ratio=0.9)[:, 2],
        stated(plain.random_patches, DRAWS, (8, 8), 6),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_masks_are_distributed_as_those_of_the_plain_statement(case):
    ours, theirs = CASES[case]()
    assert not disagreements(ours, theirs)


def test_any_corner_of_an_inverse_block_may_be_missing():
    """All else is as published: turned by the four symmetries of the rectangle."""
    ours = sampled(GRID, "inverse_block", count=127, roll=False)
    theirs = stated(plain.inverse_block, DRAWS, GRID, 127, False)
    turned = np.stack([theirs, theirs[:, ::-1], theirs[:, :, ::-1], theirs[:, ::-1, ::-1]], 1)
    choice = np.random.default_rng(0).integers(4, size=DRAWS)
    assert not disagreements(ours, turned[np.arange(DRAWS), choice])


def test_a_rolled_inverse_block_leaves_every_patch_visible_equally_often():
    masks = sampled(GRID, "inverse_block", count=127)
    visible = (~masks).mean(0).reshape(-1)
    share = 69 / 196
    assert np.abs(visible - share).max() < stats.norm.isf(ALPHA / 2 / 196) * math.sqrt(share * (1 - share) / DRAWS)


def test_a_tube_is_one_mask_in_every_frame():
    masks = sampled((4, 8, 8), "tube", draws=50)
    assert (masks == masks[:, :1]).all()


# Strategies of which the images of a batch share something: one image of each of many batches is looked at.
BATCH, BATCHES = 6, 1200


def of_batches(grid, strategy, **options):
    sampler = MaskSampler(grid, strategy, **options)
    return [sampler.sample(BATCH, seed=7, offset=step) for step in range(BATCHES)]


def test_dinov2_is_distributed_as_the_plain_statement():
    batches = of_batches(GRID, "dinov2")
    rng = random.Random(3)
    lists = [plain.dinov2(rng, GRID, BATCH) for _ in range(BATCHES)]
    for image in (0, BATCH - 1):
        ours = np.stack([batch.mask[image].numpy() for batch in batches])
        assert not disagreements(ours, np.stack([masks[image] for masks in lists]))
    counts = np.stack([np.sort(batch.mask.flatten(1).sum(1).numpy()) for batch in batches])
    assert (counts[:, : BATCH // 2] == 0).all() and (counts[:, BATCH // 2 :] > 0).all()
    assert all(batch.mask.sum() <= batch.most_masked == 45 + 71 + 98 for batch in batches)
    theirs = np.stack([np.sort([mask.sum() for mask in masks]) for masks in lists])
    for place in range(BATCH // 2, BATCH):  # the bins of ratios, each of which one image has
        assert homogeneity(counts[:, place], theirs[:, place]) >= ALPHA


@pytest.mark.parametrize("published", [False, True])
def test_multiblock_is_distributed_as_the_plain_statement(published):
    options = {"truncate": "first", "last_row": False} if published else {}
    batches = of_batches(GRID, "multiblock", **options)
    rng = random.Random(3)
    lists = [plain.multiblock(rng, GRID, BATCH, published=published) for _ in range(BATCHES)]
    for image in (0, BATCH - 1):
        ours = np.stack([~batch.mask[image].numpy() for batch in batches])
        assert not disagreements(ours, np.stack([images[image][0] for images in lists]))
    sides = [
        [ids[0, 0] // 14, ids[0, 0] % 14, ids[0, -1] // 14, ids[0, -1] % 14] for ids in (b.targets[2] for b in batches)
    ]
    top, left, bottom, right = np.array(sides).T
    theirs = np.array([images[2][1][0] for images in lists])
    for own, other in zip((top, left, bottom - top + 1, right - left + 1), theirs.T, strict=True):
        assert homogeneity(own, other) >= ALPHA
    for batch in batches[:50]:
        for ids in batch.targets.flatten(0, 1).numpy():
            rows, columns = np.unique(ids // 14), np.unique(ids % 14)
            assert len(rows) * len(columns) == len(ids) and (np.diff(ids) > 0).all(), "a rectangle, ascending"


def test_published_multiblock_never_takes_the_last_row_and_drops_the_end():
    """The two faults of the published code, by their options; without these, they are gone."""
    targets, contexts = {}, {}
    for published in (False, True):
        options = {"truncate": "first", "last_row": False} if published else {}
        batches = of_batches(GRID, "multiblock", **options)
        targets[published] = max(int(batch.targets.max()) for batch in batches)
        contexts[published] = np.mean([~batch.mask[3].numpy() for batch in batches], 0)
    assert targets[True] < 13 * 14 <= targets[False]
    # Of the rows of a context, the last ones are cut; without, top and bottom are seen equally often.
    assert contexts[True][9:].mean() < 0.5 * contexts[True][:5].mean()
    top, bottom = contexts[False][:5].mean(), contexts[False][9:].mean()
    assert abs(top - bottom) < 0.1 * top


@pytest.mark.parametrize("temporal", [(1.0, 1.0), (0.3, 0.7)])
def test_multiblock3d_is_distributed_as_the_plain_statement(temporal):
    grid, arguments = (4, 8, 8), {"blocks": 3, "scale": (0.1, 0.3)}
    batches = of_batches(grid, "multiblock3d", temporal_scale=temporal, **arguments)
    rng = random.Random(3)
    lists = [plain.multiblock3d(rng, grid, BATCH, temporal=temporal, **arguments) for _ in range(BATCHES)]
    for part in range(2):
        ours = []
        for batch in batches:
            ids = (batch.context, batch.targets[:, 0])[part][1]
            seen = np.zeros(math.prod(grid), dtype=bool)
            seen[ids.numpy()] = True
            ours.append(seen.reshape(grid))
        assert not disagreements(np.stack(ours), np.stack([images[1][part] for images in lists]))


@pytest.mark.parametrize(
    "other",
    [
        lambda: stated(plain.block, DRAWS, GRID, 75, 10),
        lambda: stated(plain.block, DRAWS, GRID, 70, 16),
        lambda: stated(plain.block, DRAWS, GRID, 75, 16, None, (0.3, 2.5)),
        lambda: np.roll(stated(plain.block, DRAWS, GRID, 75, 16), 1, 1),
    ],
    ids=["min_patches", "count", "aspect", "place"],
)
def test_the_tests_see_a_difference(other):
    assert disagreements(sampled(GRID, "block", count=75, min_patches=16), other())
