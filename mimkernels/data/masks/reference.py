"""Block masks in plain Python: what ``csrc/masks`` draws, number by number, where its module is not there.

Functions take and return what those of the module do. A mask is bool, True = inside a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count as count_up

import numpy as np
import torch

from mimkernels.ops.random_mask.reference import philox4x32

MASK, SUBSET, SECOND_SUBSET, BATCH = (
    0x80000000,
    0x90000000,
    0xA0000000,
    0xB0000000,
)  # what random numbers are for: where their counters start
_TRIES = 10  # rectangles that may be refused in a row (BEiT)
_CONTEXT_TRIES = 20  # context blocks before a target may be overlapped (I-JEPA)
_AHEAD = 32  # blocks of four words that are computed at once, for every sample

Grid = tuple[int, int]


def words(samples: np.ndarray, seed: int, epoch: int, purpose: int, first: int, blocks: int) -> np.ndarray:
    """``[n, 4 * blocks]`` words of Philox4x32-10 with key ``seed`` and counter (purpose + block, sample, epoch)."""
    low = 0xFFFFFFFF
    block = torch.arange(purpose + first, purpose + first + blocks, device="cpu")
    number = torch.from_numpy(samples.astype(np.int64))[:, None]
    counter = [
        block.expand(len(samples), -1),
        number.expand(-1, blocks),
        torch.tensor(epoch & low, device="cpu"),
        torch.tensor(epoch >> 32, device="cpu"),
    ]
    drawn = torch.stack(philox4x32(counter, (seed & low, seed >> 32)), dim=-1)
    return np.asarray(drawn.flatten(1))


class Stream:
    """The random numbers of one sample for one purpose."""

    def __init__(self, words: Iterator[int]) -> None:
        self._words = words

    def word(self) -> int:
        return next(self._words)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * (self.word() * 2.0**-32)

    def below(self, count: int) -> int:
        return self.word() * count >> 32


def streams(samples: np.ndarray, seed: int, epoch: int, purpose: int) -> Iterator[Stream]:
    """One for each sample."""
    ahead = words(samples, seed, epoch, purpose, 0, _AHEAD)

    def of(i: int) -> Iterator[int]:
        yield from map(int, ahead[i])
        for first in count_up(_AHEAD, _AHEAD):
            yield from map(int, words(samples[i : i + 1], seed, epoch, purpose, first, _AHEAD)[0])

    return (Stream(of(i)) for i in range(len(samples)))


def blocks(
    samples: np.ndarray,
    seed: int,
    epoch: int,
    *,
    grid: Grid,
    targets: Sequence[tuple[float, float]],
    picks: np.ndarray,
    whole: bool,
    min_patches: float,
    max_patches: float,
    log_aspect: tuple[float, float],
    exact: bool,
) -> np.ndarray:
    """``[n, h, w]``: rectangles added until a target is reached."""
    out = np.zeros((len(samples), *grid), dtype=bool)
    for mask, pick, stream in zip(out, picks, streams(samples, seed, epoch, MASK), strict=True):
        low, high = targets[pick if pick >= 0 else stream.below(len(targets))]
        target = low if low == high else stream.uniform(low, high)
        target = math.floor(target) if whole else target
        count = 0
        while count < target:
            added = _add_rectangle(stream, mask, min_patches, min(target - count, max_patches), log_aspect)
            if added == 0:
                break
            count += added
        if exact:
            _flip_some(stream, mask.reshape(-1), False, int(target) - count)
    return out


def _add_rectangle(
    stream: Stream, mask: np.ndarray, min_patches: float, cap: float, log_aspect: tuple[float, float]
) -> int:
    height, width = mask.shape
    for _ in range(_TRIES):
        area = stream.uniform(min_patches, cap)
        aspect = math.exp(stream.uniform(*log_aspect))
        vertical, horizontal = stream.word(), stream.word()
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        top, left = vertical * (height - h + 1) >> 32, horizontal * (width - w + 1) >> 32
        block = mask[top : top + h, left : left + w]
        added = h * w - int(block.sum())
        if 0 < added <= cap:
            block[:] = True
            return added
    return 0


def _flip_some(stream: Stream, cells: np.ndarray, value: bool, count: int) -> None:
    """Turn `count` of the cells that are `value` over, every subset as likely as any other."""
    ids = np.flatnonzero(cells == value).tolist()
    for k in range(count):
        other = k + stream.below(len(ids) - k)
        ids[k], ids[other] = ids[other], ids[k]
        cells[ids[k]] = not value


def rectangles(
    samples: np.ndarray,
    seed: int,
    epoch: int,
    *,
    grid: Grid,
    count: int,
    log_aspect: tuple[float, float],
    any_corner: bool,
    roll: bool,
) -> np.ndarray:
    """``[n, h, w]``: one rectangle of exactly `count` patches."""
    height, width = grid
    out = np.zeros((len(samples), *grid), dtype=bool)
    for mask, stream in zip(out, streams(samples, seed, epoch, MASK), strict=True):
        aspect = math.exp(stream.uniform(*log_aspect))
        h = min(math.ceil(math.sqrt(count * aspect)), height)
        w = min(math.ceil(math.sqrt(count / aspect)), width)
        while h * w < count and w < width:  # a product that rounding left below
            w += 1
        while h * w < count:
            h += 1
        top, left = stream.below(height - h + 1), stream.below(width - w + 1)
        corner = stream.word() >> 30 if any_corner else 0
        if roll:
            top += stream.below(height)
            left += stream.below(width)
        for k in range(count):
            y, x = divmod(k, w)
            y, x = h - 1 - y if corner & 1 else y, w - 1 - x if corner & 2 else x
            mask[(top + y) % height, (left + x) % width] = True
    return out


def multiblock(
    samples: np.ndarray,
    seed: int,
    epoch: int,
    *,
    grid: Grid,
    target: Grid,
    context: Grid,
    targets: int,
    min_keep: int,
    last_row: bool,
    overlap: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """``[n, h, w]`` the context and ``[n, targets, 2]`` the upper left corners of the targets."""

    def corner(stream: Stream, size: Grid) -> list[int]:
        return [stream.below(side - length + last_row) for side, length in zip(grid, size, strict=True)]

    out = np.zeros((len(samples), *grid), dtype=bool)
    corners = np.zeros((len(samples), targets, 2), dtype=np.int32)
    for mask, at, stream in zip(out, corners, streams(samples, seed, epoch, MASK), strict=True):
        for k in range(targets):
            at[k] = corner(stream, target)
        kept_out = 0 if overlap else targets
        for attempt in count_up(1):
            top, left = corner(stream, context)
            mask[:] = False
            mask[top : top + context[0], left : left + context[1]] = True
            for y, x in at[:kept_out]:
                mask[y : y + target[0], x : x + target[1]] = False
            if mask.sum() > min_keep or kept_out == 0:
                break
            if attempt % _CONTEXT_TRIES == 0:
                kept_out -= 1
    return out, corners


def multiblock3d(
    samples: np.ndarray,
    seed: int,
    epoch: int,
    *,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    blocks: int,
    context_frames: int,
    tries: int,
) -> np.ndarray:
    """``[n, t, h, w]``: the union of blocks of a video, and the frames after `context_frames`."""
    out = np.zeros((len(samples), *grid), dtype=bool)
    for mask, sample, stream in zip(out, samples, streams(samples, seed, epoch, MASK), strict=True):
        for _ in range(tries):
            mask[:] = False
            for _ in range(blocks):
                top, left = stream.below(grid[1] - block[1] + 1), stream.below(grid[2] - block[2] + 1)
                start = stream.below(grid[0] - block[0] + 1)
                mask[start : start + block[0], top : top + block[1], left : left + block[2]] = True
            mask[context_frames:] = True
            if not mask.all():
                break
        else:
            raise RuntimeError(f"sample {sample}: none of {tries} draws left a patch visible")
    return out


def thin(mask: np.ndarray, samples: np.ndarray, seed: int, epoch: int, *, count: int, second: bool) -> np.ndarray:
    """`count` of the True of each row ``[n, tokens]``, every subset as likely as any other."""
    out = mask.copy()
    for row, stream in zip(out, streams(samples, seed, epoch, SECOND_SUBSET if second else SUBSET), strict=True):
        _flip_some(stream, row, True, max(int(row.sum()) - count, 0))
    return out


def ids(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``[n, tokens]`` places of each row's False, then of its True; where each stands there; ``[n]`` how many False."""
    order = np.argsort(mask, axis=1, kind="stable")
    return order, np.argsort(order, axis=1, kind="stable"), (~mask).sum(1)
