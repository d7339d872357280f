"""Strategies of rectangles on an image: BEiT's and what came of it, CAPI's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mimkernels.data.masks import reference
from mimkernels.data.masks.batch import MaskBatch, tokens_on_host
from mimkernels.data.masks.strategy import (
    ASPECTS,
    Draw,
    Strategy,
    Wanted,
    at_least,
    boolean,
    by,
    in_range,
    is_number,
    masked_count,
    no_share,
    one_of,
)

_BEIT_ASPECT = (0.3, 1 / 0.3)


class Block(Strategy):
    """Rectangles until a target is reached (BEiT, arXiv:2106.08254): never more than ``count``, at times less.

    Args:
        min_patches: least patches of a rectangle; where fewer are missing, smaller ones come. None: a twelfth of the
            grid, which is BEiT's 16 of 14 x 14.
        max_patches: most patches of a rectangle; None: as many as are missing.
        aspect: height over width of the rectangles, log-uniform between the two.
    """

    ratio = 0.4
    ragged = True
    exact = False

    def __init__(
        self,
        wanted: Wanted,
        *,
        min_patches: int | None = None,
        max_patches: int | None = None,
        aspect: Sequence[float] = _BEIT_ASPECT,
    ) -> None:
        super().__init__(wanted)
        name, grid = wanted.name, wanted.grid
        self.count = masked_count(wanted, self.ratio)
        least = min(max(1, self.tokens // 12), self.count) if min_patches is None else min_patches
        self.options = _rectangle_options(name, grid, self.count, least, max_patches, aspect)
        if least > self.count:
            raise ValueError(f"{name}: min_patches {least} is more than the {self.count} patches to mask")

    def draw(self, draw: Draw) -> MaskBatch:
        picks = np.zeros(len(draw.samples), dtype=np.int32)
        targets = [(float(self.count), float(self.count))]
        mask = draw.module.blocks(
            *draw.key, grid=self.grid, targets=targets, picks=picks, whole=True, exact=self.exact, **self.options
        )
        return _batch(mask, draw)


class BlockExact(Block):
    """As ``block``, then single patches up to the exact count (BEiT v2, arXiv:2208.06366)."""

    ragged = False
    exact = True


class DINOv2(Strategy):
    """Half of a batch masked by blocks, by ratios spread over the batch (DINOv2, arXiv:2304.07193).

    ``int(share * B)`` images get one bin each of as many bins of ``ratios``, and ``int(N * ratio)`` patches as target;
    which images these are is random. The others are not masked.

    Args:
        share: of masked images.
        ratios: least and greatest ratio of masked patches.
        min_patches, max_patches: of a rectangle; None: half of the grid.
        aspect: as of ``block``.
    """

    ragged = True

    def __init__(
        self,
        wanted: Wanted,
        *,
        share: float = 0.5,
        ratios: Sequence[float] = (0.1, 0.5),
        min_patches: int = 4,
        max_patches: int | None = None,
        aspect: Sequence[float] = _BEIT_ASPECT,
    ) -> None:
        super().__init__(wanted)
        name, grid = wanted.name, wanted.grid
        no_share(wanted, "it spreads ratios=(low, high) over share of a batch")
        if not is_number(share) or not 0 < share <= 1:
            raise ValueError(f"{name}: share must lie in (0, 1], got {share!r}")
        self.share = share
        self.ratios = in_range(name, "ratios", ratios, 0, 1)
        most = _most(name, grid, self.ratios[1], f"ratios {tuple(ratios)}")
        largest = max(1, self.tokens // 2) if max_patches is None else max_patches
        self.options = _rectangle_options(name, grid, most, min_patches, largest, aspect)

    def draw(self, draw: Draw) -> MaskBatch:
        batch = len(draw.samples)
        masked = int(batch * self.share)
        bins = np.linspace(*self.ratios, masked + 1) * self.tokens
        targets = [*zip(bins[:-1].tolist(), bins[1:].tolist(), strict=True), (0.0, 0.0)]
        # Which image gets which bin is a matter of the batch: of its first sample.
        first = draw.samples[:1]
        words = reference.words(first, draw.seed, draw.offset, reference.BATCH, 0, -(-batch // 4)).reshape(-1)[:batch]
        order = np.argsort(words, kind="stable")
        picks = np.minimum(order, masked).astype(np.int32)
        mask = draw.module.blocks(
            *draw.key, grid=self.grid, targets=targets, picks=picks, whole=True, exact=False, **self.options
        )
        bound = sum(int(edge) for edge in bins[1:])
        return _batch(mask, draw, most_masked=bound)


class IBOT(Strategy):
    """Blocks up to a ratio that each image draws from a list (iBOT, arXiv:2111.07832).

    Args:
        ratios: (mean, spread) of each entry: a ratio uniform in mean ± spread. An image takes one of the entries.
        min_patches: of a rectangle; None: the square of a third of the shorter side.
        aspect: as of ``block``.
    """

    ragged = True

    def __init__(
        self,
        wanted: Wanted,
        *,
        ratios: Sequence[Sequence[float]] = ((0.0, 0.0), (0.3, 0.2)),
        min_patches: int | None = None,
        aspect: Sequence[float] = _BEIT_ASPECT,
    ) -> None:
        super().__init__(wanted)
        name, grid = wanted.name, wanted.grid
        no_share(wanted, "every image draws one from ratios=((mean, spread), ...)")
        if not isinstance(ratios, Sequence) or not ratios:
            raise ValueError(f"{name}: ratios must be a list of (mean, spread), got {ratios!r}")
        for entry in ratios:
            if not isinstance(entry, Sequence) or len(entry) != 2 or not all(map(is_number, entry)):
                raise ValueError(f"{name}: ratios must be a list of (mean, spread), got {entry!r} in it")
            if not 0 <= entry[1] <= entry[0] or entry[0] + entry[1] > 1:
                raise ValueError(f"{name}: ratio {entry[0]} ± {entry[1]} leaves [0, 1]")
        self.targets = [((mean - spread) * self.tokens, (mean + spread) * self.tokens) for mean, spread in ratios]
        most = _most(name, grid, max(high for _, high in self.targets) / self.tokens, f"ratios {ratios}")
        least = max(1, (min(grid) // 3) ** 2) if min_patches is None else min_patches
        self.options = _rectangle_options(name, grid, most, least, None, aspect)

    def draw(self, draw: Draw) -> MaskBatch:
        picks = np.full(len(draw.samples), -1, dtype=np.int32)
        mask = draw.module.blocks(
            *draw.key, grid=self.grid, targets=self.targets, picks=picks, whole=False, exact=False, **self.options
        )
        return _batch(mask, draw)


class InverseBlock(Strategy):
    """All but one rectangle of exactly as many patches as stay visible (CAPI, arXiv:2502.08769).

    Args:
        aspect: height over width of the rectangle, log-uniform between the two where that fits the grid.
        roll: shift the mask around the borders by a random amount, so that all patches are equally often visible.
        corner: what a rectangle has above the count is missing at ``"any"`` of its corners, or at the ``"last"`` one,
            bottom right, as published.
        predict: share of the masked patches that is predicted, a random choice (CAPI: 0.05); None: all.
    """

    ratio = 0.65

    def __init__(
        self,
        wanted: Wanted,
        *,
        aspect: Sequence[float] = (0.5, 2.0),
        roll: bool = True,
        corner: str = "any",
        predict: float | None = None,
    ) -> None:
        super().__init__(wanted)
        name, grid = wanted.name, wanted.grid
        self.count = masked_count(wanted, self.ratio)
        visible = self.tokens - self.count
        low, high = in_range(name, "aspect", aspect, *ASPECTS)
        least, most = max(low, visible / grid[1] ** 2), min(high, grid[0] ** 2 / (visible + 1e-5))
        if least > most:
            raise ValueError(
                f"{name}: a rectangle of the {visible} visible patches, {low:.3g} to {high:.3g} times as high as wide, "
                f"does not fit a grid of {by(grid)}"
            )
        self.log_aspect = (math.log(least), math.log(most))
        self.roll, self.corner = boolean(name, "roll", roll), one_of(name, "corner", corner, ("any", "last"))
        self.predicted = None
        if predict is not None:
            if not is_number(predict) or not 0 < predict <= 1 or int(self.count * predict) < 1:
                raise ValueError(
                    f"{name}: predict must be a share in (0, 1] that leaves one of the {self.count} masked patches, "
                    f"got {predict!r}"
                )
            self.predicted = int(self.count * predict)

    def draw(self, draw: Draw) -> MaskBatch:
        mask = ~draw.module.rectangles(
            *draw.key,
            grid=self.grid,
            count=self.tokens - self.count,
            log_aspect=self.log_aspect,
            any_corner=self.corner == "any",
            roll=self.roll,
        )
        predict = None
        if self.predicted is not None:
            flat = mask.reshape(-1, self.tokens)
            chosen = draw.module.thin(flat, *draw.key, count=self.predicted, second=False)
            predict = torch.from_numpy(chosen.nonzero()[1].reshape(len(mask), self.predicted))
        return _batch(mask, draw, predict=predict)


def _batch(mask: np.ndarray, draw: Draw, **others: Any) -> MaskBatch:
    flat = mask.reshape(len(mask), mask.shape[1] * mask.shape[2])
    return MaskBatch(torch.from_numpy(mask), tokens_on_host(flat, draw.module), **others)


def _most(name: str, grid: tuple[int, ...], ratio: float, asked: str) -> int:
    """The greatest count of masked patches; refuses all and none."""
    tokens = math.prod(grid)
    most = int(tokens * ratio)
    if not 0 < most < tokens:
        what = "all" if most else "none"
        raise ValueError(f"{name}: {asked} mask up to {what} of the {tokens} patches of a grid of {by(grid)}")
    return most


def _rectangle_options(
    name: str, grid: tuple[int, ...], count: int, min_patches: Any, max_patches: Any, aspect: Any
) -> dict[str, Any]:
    """What ``blocks`` takes; refuses what no rectangle fits."""
    height, width = grid
    least = at_least(name, "min_patches", min_patches, 1)
    most = count if max_patches is None else at_least(name, "max_patches", max_patches, 1)
    most = min(most, height * width)
    low, high = in_range(name, "aspect", aspect, *ASPECTS)
    log_aspect = math.log(low), math.log(high)
    # A rectangle is smaller than the grid in both directions, as published. Of those that can be drawn, does one fit?
    cap = min(count, most)
    area = np.linspace(least, cap, 129)[:, None]
    ratio = np.exp(np.linspace(*log_aspect, 129))
    h, w = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    if not ((h >= 1) & (w >= 1) & (h < height) & (w < width) & (h * w <= cap)).any():
        raise ValueError(
            f"{name}: a grid of {by(grid)} patches is too small: no rectangle of {least} to {cap} patches, {low:.3g} "
            f"to {high:.3g} times as high as wide, is below {height} high and below {width} wide"
        )
    largest = height * width
    return {"min_patches": float(min(least, largest)), "max_patches": float(most), "log_aspect": log_aspect}
