"""What a sampler gives for a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimkernels.ops import TokenMask


class Ragged(NamedTuple):
    """Ids of a batch whose images have different numbers of them.

    Attributes:
        ids: ``[M]`` int64 in ``[0, B * N)``: token n of image b is ``b * N + n``; ascending.
        offsets: ``[B + 1]`` int64: those of image b are ``ids[offsets[b]:offsets[b + 1]]``.
    """

    ids: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class MaskBatch:
    """The masks of B images of N patches.

    Attributes:
        mask: ``[B, *grid]`` bool, True = masked: the encoder does not see it.
        tokens: the same as ids, where all images have equal counts; else None. Ascending, but for ``random``.
        context: ``[B, K]`` int64, what the encoder sees, ascending; of strategies with targets, else None.
        targets: ``[B, T, L]`` int64, what is predicted, ascending in each block (multiblock3d: the union of its blocks,
            T = 1); of strategies with targets, else None.
        predict: ``[B, L]`` int64, the masked patches to be predicted, where these are not all; else None.
        most_masked: a bound on the masked patches of the whole batch that depends on its size alone (dinov2).
    """

    mask: Tensor
    tokens: TokenMask | None = None
    context: Tensor | None = None
    targets: Tensor | None = None
    predict: Tensor | None = None
    most_masked: int | None = None

    def __repr__(self) -> str:
        """Shapes, where values would wait for the device and fill pages."""
        parts = {name: getattr(self, name) for name in ("mask", "context", "targets", "predict")}
        shapes = [f"{name} {list(part.shape)}" for name, part in parts.items() if part is not None]
        kept = "masks of unequal counts" if self.tokens is None else f"{self.tokens.ids_keep.shape[1]} patches visible"
        return f"MaskBatch({', '.join(shapes)}; {kept}; {self.mask.device})"

    def masked(self) -> Ragged:
        """The masked patches of the batch. Waits for the device."""
        return _ragged(self.mask)

    def visible(self) -> Ragged:
        """The visible patches of the batch. Waits for the device."""
        return _ragged(~self.mask)

    def weights(self) -> Tensor:
        """``[M]`` fp32 for ``masked().ids``: 1 over the number of masked patches of its image (DINOv2)."""
        flat = self.mask.flatten(1)
        shares = flat.sum(1, keepdim=True).clamp(min=1).float().reciprocal()
        return shares.expand_as(flat)[flat]

    def to(self, device: torch.device | str) -> MaskBatch:
        """The same on `device`."""

        def moved(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, non_blocking=True)

        tokens = None
        if self.tokens is not None:
            tokens = TokenMask(*(value.to(device, non_blocking=True) for value in self.tokens))
        mask = self.mask.to(device, non_blocking=True)
        return MaskBatch(mask, tokens, moved(self.context), moved(self.targets), moved(self.predict), self.most_masked)


def _ragged(chosen: Tensor) -> Ragged:
    flat = chosen.flatten(1)
    offsets = torch.zeros(len(flat) + 1, dtype=torch.int64, device=flat.device)
    offsets[1:] = flat.sum(1).cumsum(0)
    return Ragged(flat.flatten().nonzero()[:, 0], offsets)


def tokens_of(flat: Tensor, keep: int) -> TokenMask:
    """Ids of masks ``[B, N]`` of which each leaves `keep` patches visible, ascending."""
    order = flat.to(torch.uint8).argsort(dim=1, stable=True)
    return TokenMask(order[:, :keep], order[:, keep:], order.argsort(dim=1), flat.float())


def tokens_on_host(mask: np.ndarray, module: Any) -> TokenMask | None:
    """The same of masks ``[B, N]`` on the CPU by the module of block masks; None where counts differ."""
    order, restore, visible = module.ids(mask)
    keep = int(visible[0]) if len(mask) else mask.shape[1]
    if (visible != keep).any():
        return None
    ids = torch.from_numpy(order)
    return TokenMask(ids[:, :keep], ids[:, keep:], torch.from_numpy(restore), torch.from_numpy(mask).float())
