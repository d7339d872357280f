"""Images as patches, for the references of the ops on patches."""

from __future__ import annotations

from torch import Tensor

from mimkernels.ops import _checks


def patchify(images: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """``[B, C, H, W]`` or ``[B, C, T, H, W]`` as ``[B, N, C, t, h, w]``, patches in row-major order of the grid."""
    images = _checks.as_video(images)
    batch, channels, *lengths = images.shape
    grid = [length // size for length, size in zip(lengths, patch, strict=True)]
    split = images.reshape(batch, channels, grid[0], patch[0], grid[1], patch[1], grid[2], patch[2])
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(1, 3)
