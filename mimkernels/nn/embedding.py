"""Patch embedding as one linear layer, of the visible patches only or of all."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkernels.nn._classes import name_beside
from mimkernels.nn.sdpa import Patches, compute_dtype, tell_patches
from mimkernels.ops import gather_tokens, patchify_gather
from mimkernels.ops._checks import has_rank

__all__ = ["embed_visible"]


def embed_visible(
    images: Tensor,
    ids: Tensor | None,
    proj: nn.Conv2d,
    *,
    norm: Callable[[Tensor], Tensor] | None = None,
    pos: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Embed the chosen patches: pixels are gathered first, so that the GEMM sees only them.

    Args:
        images: ``[B, C, H, W]`` float, or uint8 with ``mean`` and ``std``.
        ids: ``[B, K]`` int64, the visible patches of each image, in the order wanted; None for all, row by row.
        proj: the patch embedding's convolution, whose stride is its kernel; used as one linear layer.
        norm: applied to the embedded patches before positions, or None.
        pos: ``[1, N, D]`` positions of all patches, or None.
        prefix: ``[1, P, D]`` prefix tokens, their positions already added, or None.
        mean, std: per channel; pixels are normalised while they are gathered.

    Returns:
        ``[B, P + K, D]``. Under autocast the GEMM runs in autocast's dtype and the tokens have the dtype of
        the positions and prefix tokens, as plain PyTorch's promotion gives.
    """
    if not isinstance(proj, nn.Conv2d):
        raise TypeError(f"embed_visible: proj must be a torch.nn.Conv2d, got {name_beside(type(proj), nn.Conv2d)}")
    has_rank("embed_visible", "images", images, 4)
    grid = tuple(size // patch for size, patch in zip(images.shape[2:], proj.kernel_size, strict=True))
    tell_patches(proj, Patches(images.shape[0], grid, proj.kernel_size, ids))
    if ids is None:
        ids = torch.arange(math.prod(grid), device=images.device).expand(images.shape[0], -1)
    weight = proj.weight  # read once: a parametrization, such as spectral norm, makes it anew each time
    pixels = patchify_gather(images, ids, proj.kernel_size, mean, std, dtype=compute_dtype(weight))
    # kernel_size is the patch; conv weights [D, C, ph, pw] flatten to the pixel order of patchify_gather.
    x = F.linear(pixels, weight.flatten(1), proj.bias)  # [B, K, D]
    if norm is not None:
        x = norm(x)
    if pos is not None:
        # One mask per image over a batch of one position table: no copy of the table per image.
        x = x + gather_tokens(pos, ids.unsqueeze(1))
    if prefix is not None:
        # cat copies once more than adding into a buffer would, but its backward is free: views of the gradient.
        x = torch.cat((prefix.expand(x.shape[0], -1, -1), x), dim=1)
    return x
