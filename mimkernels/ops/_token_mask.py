"""What both masking ops return, and the plain expression of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenMask(NamedTuple):
    """Which patch tokens of each image stay visible, N tokens of which K are kept.

    Attributes:
        ids_keep: ``[B, K]`` int64, the kept tokens (visible).
        ids_masked: ``[B, N - K]`` int64, the removed tokens.
        ids_restore: ``[B, N]`` int64, where token n stands in ``cat(ids_keep, ids_masked)``.
        mask: ``[B, N]`` fp32, 1 = removed.
    """

    ids_keep: Tensor
    ids_masked: Tensor
    ids_restore: Tensor
    mask: Tensor


def from_op(outputs: tuple[Tensor, Tensor, Tensor], keep: int) -> TokenMask:
    ids_shuffle, ids_restore, mask = outputs
    ids_keep, ids_masked = ids_shuffle.split_with_sizes((keep, ids_shuffle.shape[1] - keep), 1)
    return TokenMask(ids_keep, ids_masked, ids_restore, mask)


def from_keys(keys: Tensor, keep: int, in_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """ids_shuffle, ids_restore and mask of ascending keys ``[B, N]``, ties by index."""
    ids_shuffle = torch.argsort(keys, dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    removed = ids_restore >= keep
    if in_order:
        ids_shuffle = torch.argsort(removed.to(torch.uint8), dim=1, stable=True)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
    return ids_shuffle, ids_restore, removed.to(torch.float32)


def fake(batch: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    ids_shuffle = torch.empty((batch, tokens), dtype=torch.int64, device=device)
    mask = torch.empty((batch, tokens), dtype=torch.float32, device=device)
    return ids_shuffle, torch.empty_like(ids_shuffle), mask
