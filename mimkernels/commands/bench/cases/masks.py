"""Block masks of a batch, against the loop that published code runs for each sample."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import numpy as np

from mimkernels.commands.bench.timing import Benchmark
from mimkernels.data.masks import MaskSampler

BATCH, GRID, COUNT, LEAST = 256, (14, 14), 75, 16  # BEiT's
_LOG_ASPECT = math.log(0.3), math.log(1 / 0.3)


def mask_cases() -> Iterator[Benchmark]:
    """Both take one core."""
    sampler = MaskSampler(GRID, "block_exact", count=COUNT, min_patches=LEAST)
    rng = random.Random(0)

    def ours() -> np.ndarray:
        return sampler.sample(BATCH, seed=0, offset=rng.randrange(2**32)).mask.numpy()

    def plain() -> np.ndarray:
        return np.stack([_block_exact(rng) for _ in range(BATCH)])

    def check() -> None:
        for draw in (ours, plain):
            masks = draw()
            assert masks.shape == (BATCH, *GRID) and (masks.sum((1, 2)) == COUNT).all()

    yield Benchmark(
        name="masks, block_exact",
        shape=f"B={BATCH} {GRID[0]} x {GRID[1]}",
        versions={"ours": ours, "plain": plain},
        check=check,
        on_host=True,
    )


def _block_exact(rng: random.Random) -> np.ndarray:
    """One mask as BEiT v2 makes it."""
    mask = np.zeros(GRID, dtype=bool)
    count = 0
    while count < COUNT:
        added = _add_rectangle(mask, COUNT - count, rng)
        if added == 0:
            break
        count += added
    ids = rng.sample(np.flatnonzero(~mask).tolist(), COUNT - count)
    mask.reshape(-1)[ids] = True
    return mask


def _add_rectangle(mask: np.ndarray, most: int, rng: random.Random) -> int:
    height, width = GRID
    for _ in range(10):
        area, aspect = rng.uniform(LEAST, most), math.exp(rng.uniform(*_LOG_ASPECT))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            block = mask[top : top + h, left : left + w]
            added = h * w - int(block.sum())
            if 0 < added <= most:
                block[:] = True
                return added
    return 0
