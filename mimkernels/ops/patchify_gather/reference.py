from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops import _checks


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


def patchify(images: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """``[B, C, H, W]`` or ``[B, C, T, H, W]`` as ``[B, N, C, t, h, w]``, patches in row-major order of the grid."""
    images = _checks.as_video(images)
    batch, channels, *lengths = images.shape
    grid = [length // size for length, size in zip(lengths, patch, strict=True)]
    split = images.reshape(batch, channels, grid[0], patch[0], grid[1], patch[1], grid[2], patch[2])
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(1, 3)
