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
    local_norm: int,
) -> Tensor:
    widest = torch.promote_types(pred.dtype, torch.float32)
    patch = (patch_t, patch_h, patch_w)
    target = targets(images, patch, scale, shift, norm_pix, local_norm, channels_last, widest).to(widest)
    options = {"beta": beta} if kind == 2 else {}
    if mask is not None and mask.dim() == 3:
        pixels = pixels_that_count(mask, images, patch)
        counted = pixels.expand(-1, -1, images.shape[1], -1, -1, -1)  # [B, N, C, 1, h, w]
        counted = (counted.movedim(2, -1) if channels_last else counted).flatten(2)  # [B, N, E]
        pred, target = (patches.masked_fill(~counted, 0.0) for patches in (pred, target))
        total = _LOSSES[kind](pred.to(target.dtype), target, reduction="none", **options).sum(dim=-1)
        count = counted.sum(dim=-1)
        return total.sum() / count.sum() if mean else torch.where(pixels.flatten(2).any(2), total / count, 0.0)
    if ids is not None:
        _checks.in_range("masked_patch_loss", "ids", ids, target.shape[1])
        target = target.gather(1, ids[..., None].expand(-1, -1, target.shape[2]))
    if mask is not None:  # what does not count has no gradient, NaN and infinity included
        pred, target = (patches.masked_fill(~mask[..., None], 0.0) for patches in (pred, target))
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
    local_norm: int,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Every patch's pixels ``[B, N, E]`` as the loss wants them, in ``dtype`` or the images' own if that is wider."""
    dtype = torch.promote_types(images.dtype, dtype)
    if local_norm:
        images = locally_normalised(images.to(dtype), scale, shift, local_norm)
        scale = shift = None
    patches = patchify(images, patch).to(dtype)  # [B, N, C, t, h, w]
    if scale is not None and shift is not None:
        patches = patches * scale[:, None, None, None] + shift[:, None, None, None]
    if channels_last:
        patches = patches.movedim(2, -1)
    target = patches.flatten(2)
    if norm_pix:
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return target


def locally_normalised(images: Tensor, scale: Tensor | None, shift: Tensor | None, size: int) -> Tensor:
    """Images whose pixels are normalised by the box of ``size x size`` pixels around each, in their own dtype."""
    pixels = _checks.as_video(images)
    if scale is not None and shift is not None:
        pixels = pixels * scale[:, None, None, None] + shift[:, None, None, None]
    pixels = pixels.double()  # the squares cancel
    average, variance = box_statistics(pixels.movedim(2, 1).flatten(0, 1), size)
    average, variance = (each.unflatten(0, (-1, pixels.shape[2])).movedim(1, 2) for each in (average, variance))
    normalised: Tensor = (pixels - average) / (variance + 1e-6).sqrt()
    return normalised.to(images.dtype).reshape(images.shape)


def box_statistics(pixels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of the box around each pixel of ``[B, C, H, W]``, of the pixels inside the image."""
    average, square = _box_mean(pixels, size), _box_mean(pixels.square(), size)
    rows, columns = (_box_counts(length, size, pixels) for length in pixels.shape[2:])
    count = rows[:, None] * columns
    variance = (square - average.square()) * (count / (count - 1).clamp(min=1))
    return average, variance.clamp(min=0)


def _box_mean(x: Tensor, size: int) -> Tensor:
    # One axis after the other: 2 * size additions per pixel in place of size squared.
    if x.numel() == 0:
        return x
    for axis in (2, 3):
        reach = min(size // 2, x.shape[axis])
        kernel, padding = (2 * reach + 1, 1), (reach, 0)
        if axis == 3:
            kernel, padding = kernel[::-1], padding[::-1]
        wide = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        total = F.avg_pool2d(wide, kernel, 1, divisor_override=1)
        counts = _box_counts(x.shape[axis], size, x)
        x = total / (counts[:, None] if axis == 2 else counts)
    return x


def _box_counts(length: int, size: int, like: Tensor) -> Tensor:
    """How many of ``size`` pixels around each of ``length`` lie inside."""
    place = torch.arange(length, device=like.device)
    reach = min(size // 2, length)
    return ((place + reach).clamp(max=length - 1) - (place - reach).clamp(min=0) + 1).to(like.dtype)


def pixels_that_count(mask: Tensor, images: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """``[B, N, 1, 1, h, w]`` bool of a mask ``[B, rows, columns]`` that divides the images."""
    for axis in (1, 2):
        mask = mask.repeat_interleave(images.shape[axis - 3] // max(mask.shape[axis], 1), dim=axis)
    return patchify(mask[:, None], patch)
