from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._patches import patchify


def patchify_gather(
    images: Tensor,
    ids: Tensor | None,
    patch_t: int,
    patch_h: int,
    patch_w: int,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    patches = patchify(images, (patch_t, patch_h, patch_w))  # [B, N, C, t, h, w]
    if ids is not None:
        _checks.in_range("patchify_gather", "ids", ids, patches.shape[1])
        ids = _checks.as_masks(ids)
        batch = torch.arange(images.shape[0], device=images.device)[:, None]
        patches = patches[batch, ids].flatten(0, 1)  # [M*B, K, C, t, h, w]
    if scale is not None and shift is not None:
        widest = torch.promote_types(torch.promote_types(images.dtype, dtype), torch.float32)
        patches = patches.to(widest) * scale[:, None, None, None] + shift[:, None, None, None]
    return patches.flatten(2).to(dtype)
