"""From predicted patches back to pictures that people can look at."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mimkernels.ops.masked_patch_loss.reference import box_statistics

__all__ = ["Pictures", "pictures_of"]


class Pictures(NamedTuple):
    """Three pictures per image, each ``[B, 3, H, W]`` fp32 in [0, 1].

    Attributes:
        original: the image itself.
        masked: the image with masked patches in the mean colour.
        reconstruction: the image with masked patches as predicted.
    """

    original: Tensor
    masked: Tensor
    reconstruction: Tensor


def pictures_of(
    images: Tensor,
    pred: Tensor,
    mask: Tensor,
    patch_size: tuple[int, int],
    *,
    norm_pix: bool,
    local_norm: int | None = None,
    mean: Sequence[float] | Tensor | None,
    std: Sequence[float] | Tensor | None,
) -> Pictures:
    """Pictures of predictions ``pred [B, N, E]`` for `images` ``[B, C, H, W]``, C = 1 or 3.

    Args:
        mask: ``[B, h, w]`` on any grid that divides the images, nonzero = masked.
        patch_size: of the patches of `pred`.
        norm_pix: predictions are relative to each patch's own mean and deviation, which the image gives.
        local_norm: predictions are relative to the mean and deviation in a box of this side around each pixel.
        mean, std: per channel, what the model normalises pixels with; None if it takes pixels as they are.
    """
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ValueError(f"pictures need images of 1 or 3 channels, got {channels} ({list(images.shape)})")
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    shift = pixels.new_zeros(channels, 1, 1) if mean is None else _per_channel(mean, pixels)
    scale = pixels.new_ones(channels, 1, 1) if std is None else _per_channel(std, pixels)
    grid = images.shape[-2] // patch_size[0], images.shape[-1] // patch_size[1]

    values = pred.float().unflatten(2, (-1, channels))
    if norm_pix:
        # The statistics of the normalised pixels, over all channels of a patch, as the loss takes them.
        target = _patchify((pixels - shift) / scale, patch_size, grid).flatten(2)
        spread = (target.var(dim=2, keepdim=True) + 1e-6).sqrt()
        values = values * spread.unsqueeze(3) + target.mean(dim=2, keepdim=True).unsqueeze(3)
    predicted = _unpatchify(values, patch_size, grid)
    if local_norm is not None:
        average, variance = box_statistics(((pixels - shift) / scale).double(), local_norm)
        predicted = predicted * (variance + 1e-6).sqrt().float() + average.float()
    predicted = predicted * scale + shift
    blank = shift if mean is not None else torch.full_like(shift, 0.5)

    hidden = mask.bool()
    for axis in (1, 2):
        hidden = hidden.repeat_interleave(pixels.shape[axis + 1] // mask.shape[axis], dim=axis)
    hidden = hidden.unsqueeze(1)
    pictures = (pixels, torch.where(hidden, blank, pixels), torch.where(hidden, predicted, pixels))
    return Pictures(*(picture.clamp(0, 1).expand(-1, 3, -1, -1).contiguous() for picture in pictures))


def _per_channel(values: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def _patchify(pixels: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    batch, channels = pixels.shape[:2]
    cut = pixels.reshape(batch, channels, grid[0], patch_size[0], grid[1], patch_size[1])
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, grid[0] * grid[1], -1, channels)


def _unpatchify(patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    batch, channels = patches.shape[0], patches.shape[-1]
    cut = patches.reshape(batch, *grid, *patch_size, channels)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, grid[0] * patch_size[0], grid[1] * patch_size[1])
