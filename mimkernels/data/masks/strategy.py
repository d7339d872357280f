"""What every masking strategy is, and the checks that several of them share: each refusal shows both sides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, TypeGuard

import numpy as np
import torch
from torch import Tensor

from mimkernels.data.masks.batch import MaskBatch

Range = tuple[float, float]


@dataclass(frozen=True)
class Draw:
    """One call of ``MaskSampler.sample``.

    Attributes:
        samples: ``[B]`` uint32, the samples' numbers.
        numbered: whether they were given; else they are 0 .. B - 1.
        step: added to `offset`; a tensor on the device, where strategies on the device are drawn.
        module: where block masks are drawn: the native module or ``reference``.
        scores: ``[B, N]`` for strategies that follow them.
    """

    samples: np.ndarray
    numbered: bool
    seed: int
    offset: int
    step: Tensor | None
    device: torch.device | None
    backend: str
    module: Any
    scores: Tensor | None

    @property
    def key(self) -> tuple[np.ndarray, int, int]:
        return self.samples, self.seed, self.offset


@dataclass(frozen=True)
class Wanted:
    """What every strategy is asked for: its name in messages, the grid, a share of masked patches or their number."""

    name: str
    grid: tuple[int, ...]
    ratio: float | None
    count: int | None


class Strategy:
    """A way to choose masked patches on a grid.

    Subclasses take what is wanted and options of their own by keyword, check them, and draw.
    """

    dims: ClassVar[int] = 2  # of the grid
    ratio: ClassVar[float | None] = None  # share of masked patches where none is given
    on_device: ClassVar[bool] = False  # drawn where the masks are wanted; else by csrc/masks
    needs_scores: ClassVar[bool] = False
    ragged: ClassVar[bool] = False  # images of a batch may have different numbers of masked patches

    def __init__(self, wanted: Wanted) -> None:
        self.name, self.grid, self.tokens = wanted.name, wanted.grid, math.prod(wanted.grid)

    def draw(self, draw: Draw) -> MaskBatch:
        raise NotImplementedError


def by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def masked_count(wanted: Wanted, default: float | None) -> int:
    """How many patches of the grid to mask; of a ratio, what MAE's rounding leaves: ``N - int(N * (1 - ratio))``."""
    name, grid, ratio, count = wanted.name, wanted.grid, wanted.ratio, wanted.count
    tokens = math.prod(grid)
    if ratio is not None and count is not None:
        raise ValueError(f"{name}: give ratio or count, got ratio {ratio} and count {count}")
    asked = f"count {count}"
    if count is None:
        ratio = default if ratio is None else ratio
        if not is_number(ratio) or not 0 < ratio < 1:
            raise ValueError(f"{name}: ratio must lie between 0 and 1, both excluded, got {ratio!r}")
        count, asked = tokens - int(tokens * (1 - ratio)), f"ratio {ratio}"
    if not is_count(count) or not 0 < count < tokens:
        what = "all" if is_count(count) and count >= tokens else "none" if is_count(count) else "no number"
        raise ValueError(
            f"{name}: {asked} masks {what} of the {tokens} patches of a grid of {by(grid)}; some must be masked and "
            f"some visible: 1 to {tokens - 1}"
        )
    return int(count)


def no_share(wanted: Wanted, instead: str) -> None:
    """Refuse a ratio and a count where the strategy draws them."""
    for what, value in (("ratio", wanted.ratio), ("count", wanted.count)):
        if value is not None:
            raise ValueError(f"{wanted.name} takes no {what} (got {value}): {instead}")


def is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def at_least(name: str, option: str, value: Any, least: int) -> int:
    if not is_count(value) or not least <= value < _MOST:
        most = f" and below {_MOST}" if is_count(value) and value >= _MOST else ""
        raise ValueError(f"{name}: {option} must be an integer of at least {least}{most}, got {value!r}")
    return int(value)


def in_range(name: str, option: str, value: Any, low: float, high: float) -> Range:
    """Two ascending numbers in [low, high]."""
    if not isinstance(value, Sequence) or len(value) != 2 or not all(map(is_number, value)):
        raise ValueError(f"{name}: {option} must be two numbers, (low, high), got {value!r}")
    first, last = float(value[0]), float(value[1])
    if not low <= first <= last <= high:
        raise ValueError(f"{name}: {option} must be ascending in [{low:g}, {high:g}], got {value!r}")
    return first, last


def boolean(name: str, option: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {option} must be true or false, got {value!r}")
    return value


def one_of(name: str, option: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: {option} must be one of {', '.join(choices)}, got {value!r}")
    return str(value)


_MOST = 2**31
ASPECTS = (1e-3, 1e3)  # aspect ratios (height over width) that any option may have
