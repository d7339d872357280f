from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mimkernels.ops import _checks
from mimkernels.ops._patches import patchify

_LOSSES: tuple[Callable[..., Tensor], ...] = (F.mse_loss, F.l1_loss, F.smooth_l1_loss)


def masked_patch_loss(
    pred: Tensor,
    images: Tensor,
    ids: Tensor | None,
    mask: Tensor | None,
    patch_t: int,
    patch_h: int,
    patch_w: int,
    scale: Tensor | None,
    shift: Tensor | None,
    norm_pix: bool,
    kind: int,
    beta: float,
    channels_last: bool,
    mean: bool,
) -> Tensor:
    widest = torch.promote_types(pred.dtype, torch.float32)
    target = targets(images, (patch_t, patch_h, patch_w), scale, shift, norm_pix, channels_last, widest).to(widest)
    if ids is not None:
        _checks.in_range("masked_patch_loss", "ids", ids, target.shape[1])
        target = target.gather(1, ids[..., None].expand(-1, -1, target.shape[2]))
    if mask is not None:  # what does not count has no gradient, NaN and infinity included
        pred, target = (patches.masked_fill(~mask[..., None], 0.0) for patches in (pred, target))
    options = {"beta": beta} if kind == 2 else {}
    loss = _LOSSES[kind](pred.to(target.dtype), target, reduction="none", **options).mean(dim=-1)  # [B, L]
    if mask is None:
        return loss.mean() if mean else loss
    loss = torch.where(mask, loss, 0.0)  # of patches without pixels the mean is NaN
    return loss.sum() / mask.sum() if mean else loss


@torch.no_grad()
def targets(
    images: Tensor,
    patch: tuple[int, int, int],
    scale: Tensor | None,
    shift: Tensor | None,
    norm_pix: bool,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Every patch's pixels ``[B, N, E]`` as the loss wants them, in ``dtype`` or the images' own if that is wider."""
    patches = patchify(images, patch).to(torch.promote_types(images.dtype, dtype))  # [B, N, C, t, h, w]
    if scale is not None and shift is not None:
        patches = patches * scale[:, None, None, None] + shift[:, None, None, None]
    if channels_last:
        patches = patches.movedim(2, -1)
    target = patches.flatten(2)
    if norm_pix:
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return target
