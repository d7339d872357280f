from __future__ import annotations

from torch import Tensor

from mimkernels.ops import _token_mask


def mask_from_noise(noise: Tensor, keep: int, in_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _token_mask.from_keys(noise, keep, in_order)
