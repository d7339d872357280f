"""Strategies of regular shape, drawn where the masks are wanted by the ops' random numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimkernels.data.masks.batch import MaskBatch, tokens_of
from mimkernels.data.masks.strategy import Draw, Strategy, Wanted, at_least, by, is_count, is_number, masked_count
from mimkernels.ops import TokenMask, _token_mask, mask_from_noise, random_mask
from mimkernels.ops.random_mask.reference import noise, philox4x32


class Random(Strategy):
    """Patches independently of each other (MAE, arXiv:2111.06377): ``random_mask``, integer for integer."""

    ratio = 0.75
    on_device = True

    def __init__(self, wanted: Wanted) -> None:
        super().__init__(wanted)
        self.keep = self.tokens - masked_count(wanted, self.ratio)

    def draw(self, draw: Draw) -> MaskBatch:
        tokens = _random(draw, self.tokens, self.keep)
        return MaskBatch(tokens.mask.bool().unflatten(1, self.grid), tokens)


class Unit(Strategy):
    """Squares of ``unit`` x ``unit`` patches independently of each other (SimMIM, arXiv:2111.09886).

    A ratio masks ``ceil(ratio * units)`` of them. A ``count`` is in patches.
    """

    ratio = 0.6
    on_device = True

    def __init__(self, wanted: Wanted, *, unit: int = 2) -> None:
        super().__init__(wanted)
        name, grid, ratio, count = wanted.name, wanted.grid, wanted.ratio, wanted.count
        self.unit = at_least(name, "unit", unit, 1)
        if any(side % self.unit for side in grid):
            raise ValueError(f"{name}: a unit of {unit} x {unit} patches does not divide a grid of {by(grid)} patches")
        self.cells = tuple(side // self.unit for side in grid)
        units = math.prod(self.cells)
        if count is not None:
            if is_count(count) and count % self.unit**2:
                raise ValueError(
                    f"{name}: count {count} is no multiple of the {self.unit**2} patches of a unit of {unit} x {unit}"
                )
            masked = masked_count(wanted, None) // self.unit**2
        else:
            share = self.ratio if ratio is None else ratio
            if is_number(share) and 0 < share < 1:
                masked = math.ceil(units * share)
                if masked == units:
                    raise ValueError(
                        f"{name}: ratio {share} masks all of the {units} units of {unit} x {unit} in a grid of "
                        f"{by(grid)} patches; at most {(units - 1) / units:.3g} leaves one visible"
                    )
            else:
                masked = masked_count(replace(wanted, grid=self.cells, ratio=share), None)
        self.keep = units - masked

    def draw(self, draw: Draw) -> MaskBatch:
        cells = _random(draw, math.prod(self.cells), self.keep).mask.bool().unflatten(1, self.cells)
        mask = cells.repeat_interleave(self.unit, 1).repeat_interleave(self.unit, 2)
        return MaskBatch(mask, tokens_of(mask.flatten(1), self.keep * self.unit**2))


class Uniform(Strategy):
    """All but one patch of every 2 x 2 cell (UM-MAE, arXiv:2205.10063)."""

    ratio = 0.75
    on_device = True

    def __init__(self, wanted: Wanted) -> None:
        super().__init__(wanted)
        name, grid, ratio, count = wanted.name, wanted.grid, wanted.ratio, wanted.count
        if any(side % 2 for side in grid):
            raise ValueError(f"{name}: cells of 2 x 2 patches do not divide a grid of {by(grid)} patches")
        masked = self.tokens // 4 * 3
        if ratio not in (None, 0.75) or count not in (None, masked):
            asked = f"ratio {ratio}" if ratio is not None else f"count {count}"
            raise ValueError(f"{name}: masks 3 of 4 patches, {masked} of {self.tokens}, not {asked}")

    def draw(self, draw: Draw) -> MaskBatch:
        height, width = (side // 2 for side in self.grid)
        visible = (_noise(draw, height * width) >> 30)[:, :, None]  # [B, cells, 1], patch of the cell
        masked = visible != torch.arange(4, device=visible.device)
        mask = masked.view(-1, height, width, 2, 2).transpose(2, 3).reshape(-1, *self.grid)
        return MaskBatch(mask, tokens_of(mask.flatten(1), self.tokens // 4))


class Tube(Strategy):
    """One random mask of the image, repeated over the frames of a video (VideoMAE, arXiv:2203.12602)."""

    dims = 3
    ratio = 0.9
    on_device = True

    def __init__(self, wanted: Wanted) -> None:
        super().__init__(wanted)
        name, grid, count = wanted.name, wanted.grid, wanted.count
        frames, plane = grid[0], grid[1:]
        if count is not None and is_count(count):
            if count % frames:
                raise ValueError(f"{name}: count {count} is no multiple of the {frames} frames of a grid of {by(grid)}")
            count = count // frames
        self.keep = math.prod(plane) - masked_count(replace(wanted, grid=plane, count=count), self.ratio)

    def draw(self, draw: Draw) -> MaskBatch:
        plane = _random(draw, math.prod(self.grid[1:]), self.keep).mask.bool().unflatten(1, self.grid[1:])
        mask = plane[:, None].expand(-1, self.grid[0], -1, -1).contiguous()
        return MaskBatch(mask, tokens_of(mask.flatten(1), self.keep * self.grid[0]))


class AttentionGuided(Strategy):
    """The patches to which a teacher's [cls] token attends most (AttMask, arXiv:2203.12719); nothing is random.

    ``sample(..., scores=...)`` takes ``[B, N]``, such as the mean over heads of the last layer's [cls] row
    (``mimkernels.attention_rows``). Ties go to the higher index.
    """

    ratio = 0.4
    on_device = True
    needs_scores = True

    def __init__(self, wanted: Wanted) -> None:
        super().__init__(wanted)
        self.keep = self.tokens - masked_count(wanted, self.ratio)

    def draw(self, draw: Draw) -> MaskBatch:
        assert draw.scores is not None
        tokens = mask_from_noise(draw.scores, self.keep, order="sorted", backend=draw.backend)
        return MaskBatch(tokens.mask.bool().unflatten(1, self.grid), tokens)


def _random(draw: Draw, tokens: int, keep: int) -> TokenMask:
    if draw.numbered:
        return _token_mask.from_op(_token_mask.from_keys(_noise(draw, tokens), keep, False), keep)
    offset: Any = draw.offset if draw.step is None else draw.step
    return random_mask(len(draw.samples), tokens, keep, draw.seed, offset, device=draw.device, backend=draw.backend)


def _noise(draw: Draw, tokens: int) -> Tensor:
    """``[B, tokens]`` int64 in [0, 2^32): the draws of ``random_mask`` for these samples."""
    device = draw.device or torch.get_default_device()
    if not draw.numbered:
        return noise(draw.seed, draw.offset, draw.step, len(draw.samples), tokens, device)
    groups = -(-tokens // 4)
    samples = torch.from_numpy(draw.samples.astype(np.int64))[:, None]
    counter = [
        torch.arange(groups, device="cpu").expand(len(samples), -1),
        samples.expand(-1, groups),
        torch.tensor(draw.offset & 0xFFFFFFFF, device="cpu"),
        torch.tensor(draw.offset >> 32, device="cpu"),
    ]
    words = philox4x32(counter, (draw.seed & 0xFFFFFFFF, draw.seed >> 32))
    return torch.stack(words, dim=-1).flatten(1)[:, :tokens].to(device)
