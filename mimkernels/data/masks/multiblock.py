"""Strategies of joint-embedding predictive architectures: a context that is seen, targets that are predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimkernels.data.masks import reference
from mimkernels.data.masks.batch import MaskBatch, tokens_on_host
from mimkernels.data.masks.strategy import (
    ASPECTS,
    Draw,
    Range,
    Strategy,
    Wanted,
    at_least,
    boolean,
    by,
    in_range,
    is_number,
    no_share,
    one_of,
)

_TRUNCATIONS = ("random", "first")
_TRIES = 1000  # draws of a video's blocks until one leaves a patch visible


class Multiblock(Strategy):
    """Target blocks of one size, and a context block without them (I-JEPA, arXiv:2301.08243).

    A batch has one size of targets and one of context; where they lie, each image draws. A context of ``min_keep`` or
    fewer patches is drawn again, after 20 times with one target less kept out of it. All contexts get the size of the
    smallest.

    Args:
        targets: how many target blocks an image has; they may overlap.
        scale, aspect: share of the grid and height over width of a target; one random number chooses both.
        context_scale: share of the grid of the context block, which is as square as the grid allows.
        min_keep: a block has more patches than this.
        overlap: the context keeps what targets cover.
        truncate: ``"random"`` patches are dropped from larger contexts; ``"first"`` keeps those with the lowest
            indices, as published, which always drops the bottom of the image.
        last_row: blocks may lie at the last row and column, which published code never takes.
    """

    def __init__(
        self,
        wanted: Wanted,
        *,
        targets: int = 4,
        scale: Sequence[float] = (0.15, 0.2),
        aspect: Sequence[float] = (0.75, 1.5),
        context_scale: Sequence[float] = (0.85, 1.0),
        min_keep: int = 10,
        overlap: bool = False,
        truncate: str = "random",
        last_row: bool = True,
    ) -> None:
        super().__init__(wanted)
        name, grid = wanted.name, wanted.grid
        no_share(wanted, "scale and context_scale say how much its blocks cover")
        self.targets = at_least(name, "targets", targets, 1)
        self.scale = in_range(name, "scale", scale, 0, 1)
        self.aspect = in_range(name, "aspect", aspect, *ASPECTS)
        self.context_scale = in_range(name, "context_scale", context_scale, 0, 1)
        self.min_keep = at_least(name, "min_keep", min_keep, 0)
        self.overlap = boolean(name, "overlap", overlap)
        self.truncate = one_of(name, "truncate", truncate, _TRUNCATIONS)
        self.last_row = boolean(name, "last_row", last_row)
        # Published code looks for a block with more than min_keep patches for ever where there is none.
        for what, scales, aspects in (
            ("target", self.scale, self.aspect),
            ("context", self.context_scale, (1.0, 1.0)),
        ):
            sizes = {self._size(u, scales, aspects) for u in np.linspace(0, 1, 1025).tolist()}
            h, w = min(sizes, key=lambda size: size[0] * size[1])
            if h * w <= self.min_keep or min(h, w) < 1:
                raise ValueError(
                    f"{name}: a grid of {by(grid)} patches is too small: a {what} block of {scales[0]:g} to "
                    f"{scales[1]:g} of it, below {grid[0]} high and below {grid[1]} wide, can be {h} x {w} = {h * w} "
                    f"patches, and must have more than min_keep {self.min_keep}"
                )

    def _size(self, u: float, scale: Range, aspect: Range) -> tuple[int, int]:
        area = int(self.tokens * (scale[0] + u * (scale[1] - scale[0])))
        ratio = aspect[0] + u * (aspect[1] - aspect[0])
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        return min(h, self.grid[0] - 1), min(w, self.grid[1] - 1)

    def draw(self, draw: Draw) -> MaskBatch:
        for_target, for_context = _of_the_batch(draw)[:2]
        target = self._size(for_target, self.scale, self.aspect)
        context_size = self._size(for_context, self.context_scale, (1.0, 1.0))
        context, corners = draw.module.multiblock(
            *draw.key,
            grid=self.grid,
            target=target,
            context=context_size,
            targets=self.targets,
            min_keep=self.min_keep,
            last_row=self.last_row,
            overlap=self.overlap,
        )
        flat, keep = _to_the_smallest(context.reshape(-1, self.tokens), draw, self.truncate, self.tokens)
        rows, columns = (torch.arange(side, device="cpu") for side in target)
        top, left = torch.from_numpy(corners.astype(np.int64)).unbind(-1)  # [B, T] each
        row = (top[..., None] + rows)[..., :, None]
        ids = row * self.grid[1] + (left[..., None] + columns)[..., None, :]  # [B, T, h, w]
        return MaskBatch(
            torch.from_numpy(~flat).unflatten(1, self.grid),
            tokens_on_host(~flat, draw.module),
            context=_ids(flat, keep),
            targets=ids.flatten(2),
        )


class Multiblock3d(Strategy):
    """The union of blocks of a video is predicted from all else (V-JEPA, arXiv:2404.08471; V-JEPA 2, arXiv:2506.09985).

    A batch has one size of blocks; where they lie, each video draws. All contexts, and all unions, get the size of the
    smallest. Several groups of blocks are several samplers, each with a ``stream`` of its own.

    Args:
        blocks: how many there are (published: 8 small ones and 2 large ones).
        scale: share of a frame that a block covers (0.15 and 0.7).
        temporal_scale: share of the frames that it covers.
        aspect: height over width of a block.
        context_frames: share of the frames, from the first on, that may be seen.
        max_keep: most patches of a context; None: no bound.
        truncate: as of ``multiblock``.
        complement: ``"context"``: what is predicted is all that the cut context leaves; ``"targets"``: the context is
            all that the cut union leaves; None: neither.
        inverse: what would be seen is predicted, and the other way round.
    """

    dims = 3

    def __init__(
        self,
        wanted: Wanted,
        *,
        blocks: int = 8,
        scale: Sequence[float] = (0.15, 0.15),
        temporal_scale: Sequence[float] = (1.0, 1.0),
        aspect: Sequence[float] = (0.75, 1.5),
        context_frames: float = 1.0,
        max_keep: int | None = None,
        truncate: str = "random",
        complement: str | None = None,
        inverse: bool = False,
    ) -> None:
        super().__init__(wanted)
        name, grid = wanted.name, wanted.grid
        no_share(wanted, "scale, temporal_scale and blocks say how much is masked")
        self.blocks = at_least(name, "blocks", blocks, 1)
        self.scale = in_range(name, "scale", scale, 0, 1)
        self.temporal_scale = in_range(name, "temporal_scale", temporal_scale, 0, 1)
        self.aspect = in_range(name, "aspect", aspect, *ASPECTS)
        if not is_number(context_frames) or not 0 < context_frames <= 1:
            raise ValueError(f"{name}: context_frames must be a share in (0, 1], got {context_frames!r}")
        self.context_frames = max(1, int(grid[0] * context_frames))
        self.max_keep = None if max_keep is None else at_least(name, "max_keep", max_keep, 1)
        self.truncate = one_of(name, "truncate", truncate, _TRUNCATIONS)
        self.complement = None if complement is None else one_of(name, "complement", complement, ("context", "targets"))
        self.inverse = boolean(name, "inverse", inverse)
        steps = np.linspace(0, 1, 65).tolist()
        planes = {self._plane(u, v) for u in steps for v in steps}
        smallest, largest = min(planes, key=min), max(planes, key=math.prod)
        if min(smallest) < 1:
            raise ValueError(
                f"{name}: a grid of {by(grid)} patches is too small: a block of {self.scale[0]:g} of a frame of "
                f"{grid[1] * grid[2]} patches can be {by(smallest)}"
            )
        if self._covers(largest, int(grid[0] * self.temporal_scale[1])):
            raise ValueError(
                f"{name}: a block of {self.scale[1]:g} of a frame and {self.temporal_scale[1]:g} of the frames can "
                f"cover all {by(grid)} patches that may be seen; none would be left to be"
            )

    def _plane(self, for_scale: float, for_aspect: float) -> tuple[int, int]:
        area = int(self.grid[1] * self.grid[2] * (self.scale[0] + for_scale * (self.scale[1] - self.scale[0])))
        ratio = self.aspect[0] + for_aspect * (self.aspect[1] - self.aspect[0])
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        return min(h, self.grid[1]), min(w, self.grid[2])

    def _covers(self, plane: tuple[int, int], frames: int) -> bool:
        return plane == self.grid[1:] and max(1, frames) >= self.grid[0]

    def draw(self, draw: Draw) -> MaskBatch:
        for_frames, for_scale, for_aspect, _ = _of_the_batch(draw)
        low, high = self.temporal_scale
        frames = max(1, int(self.grid[0] * (low + for_frames * (high - low))))
        union = draw.module.multiblock3d(
            *draw.key,
            grid=self.grid,
            block=(frames, *self._plane(for_scale, for_aspect)),
            blocks=self.blocks,
            context_frames=self.context_frames,
            tries=_TRIES,
        ).reshape(-1, self.tokens)
        bound = self.tokens if self.max_keep is None else self.max_keep
        context, keep = _to_the_smallest(~union, draw, self.truncate, bound)
        targets, predicted = _to_the_smallest(union, draw, self.truncate, self.tokens, second=True)
        if self.complement == "context":
            targets, predicted = ~context, self.tokens - keep
        elif self.complement == "targets":
            context, keep = ~targets, self.tokens - predicted
        if self.inverse:
            context, keep, targets, predicted = targets, predicted, context, keep
        return MaskBatch(
            torch.from_numpy(~context).unflatten(1, self.grid),
            tokens_on_host(~context, draw.module),
            context=_ids(context, keep),
            targets=_ids(targets, predicted)[:, None],
        )


def _of_the_batch(draw: Draw) -> list[float]:
    """Four numbers in [0, 1) that all images of a batch share: those of its first sample."""
    words = reference.words(draw.samples[:1], draw.seed, draw.offset, reference.BATCH, 0, 1)
    return [float(word) * 2.0**-32 for word in words.reshape(-1)] if len(draw.samples) else [0.0] * 4


def _to_the_smallest(
    chosen: np.ndarray, draw: Draw, truncate: str, most: int, second: bool = False
) -> tuple[np.ndarray, int]:
    """``[B, N]`` with as many True in every row as the row with fewest has, and at most `most`; and how many."""
    counts = chosen.sum(1)
    keep = min(int(counts.min()) if len(counts) else 0, most)
    if truncate == "first":
        return chosen & (chosen.cumsum(1) <= keep), keep
    thinned: np.ndarray = draw.module.thin(chosen, *draw.key, count=keep, second=second)
    return thinned, keep


def _ids(chosen: np.ndarray, count: int) -> Tensor:
    """``[B, count]`` the columns of the True of each row, ascending."""
    ids: Any = chosen.nonzero()[1]
    return torch.from_numpy(ids.reshape(len(chosen), count))
