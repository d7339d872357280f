"""What masked pixels are compared with: themselves, or normalised by their patch or their neighbourhood."""

import re
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Target", "local_norm", "local_statistics", "parse_target"]

_LOCAL = re.compile(r"local-norm:(\d+)")


class Target(NamedTuple):
    """A target as the loss takes it.

    Attributes:
        norm_pix: normalise by each patch's own mean and deviation.
        local_norm: normalise by the mean and deviation in a box of this side around each pixel; None for neither.
    """

    norm_pix: bool = False
    local_norm: int | None = None


def parse_target(text: str) -> Target:
    """``"pixels"``, ``"patch-norm"`` or ``"local-norm:K"``, K odd and at least 3.

    Raises:
        ValueError: anything else.
    """
    if text == "pixels":
        return Target()
    if text == "patch-norm":
        return Target(norm_pix=True)
    match = _LOCAL.fullmatch(text) if isinstance(text, str) else None
    if match is not None and int(match[1]) % 2 and int(match[1]) >= 3:
        return Target(local_norm=int(match[1]))
    raise ValueError(
        f"target must be pixels, patch-norm, or local-norm:K with an odd number of pixels K of at least 3 "
        f"(published: local-norm:47), got {text!r}"
    )


@torch.no_grad()
def local_norm(images: Tensor, size: int, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
    """Images whose every pixel is normalised by its neighbourhood, ``[B, C, H, W]`` fp32.

    Args:
        images: ``[B, C, H, W]`` uint8 or floating point.
        size: side of the box around each pixel, odd; only pixels inside the image count.
        mean, std: per channel, for pixels in [0, 1]; applied first. uint8 images need them.

    Source: ``norm_targets`` of the SimMIM code of Swin Transformer V2, arXiv:2111.09883.
    """
    pixels = images.float()
    if images.dtype == torch.uint8:
        pixels = pixels / 255
    if mean is not None and std is not None:
        pixels = (pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    average, deviation = local_statistics(pixels, size)
    return (pixels - average) / deviation


def local_statistics(pixels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean, and root of unbiased variance + 1e-6, of the box around each pixel of ``[B, C, H, W]`` fp32."""
    with torch.autocast(pixels.device.type, enabled=False):
        average = _box_mean(pixels, size)
        square = _box_mean(pixels.square(), size)
        rows, columns = (_box_counts(length, size, pixels.device) for length in pixels.shape[2:])
        count = rows[:, None] * columns
        variance = (square - average.square()) * (count / (count - 1).clamp(min=1))
        return average, (variance.clamp(min=0) + 1e-6).sqrt()


def _box_mean(x: Tensor, size: int) -> Tensor:
    # One axis after the other: 2 * size additions per pixel in place of size squared.
    for kernel in ((size, 1), (1, size)):
        padding = (kernel[0] // 2, kernel[1] // 2)
        x = F.avg_pool2d(x, kernel, 1, padding, count_include_pad=False)
    return x


def _box_counts(length: int, size: int, device: torch.device) -> Tensor:
    """How many of `size` pixels around each of `length` lie inside, fp32."""
    place = torch.arange(length, device=device)
    reach = size // 2
    return ((place + reach).clamp(max=length - 1) - (place - reach).clamp(min=0) + 1).float()
