"""Mixup and cutmix, by timm, for the methods that learn from labels; imports no torch, for the parser's sake."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_pairs", "mix_pairs"]


def check_pairs(mixup: float, cutmix: float, batch_size: int) -> None:
    """Raise ValueError unless a batch divides into the pairs that are mixed, where any are."""
    if max(mixup, cutmix) > 0 and batch_size % 2:
        raise ValueError(f"mixup and cutmix mix pairs of images: batch_size must be even, got {batch_size}")


def mix_pairs(
    pixels: Tensor, targets: Tensor, *, mixup: float, cutmix: float, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Images with shares of others, and shares of classes ``[B, classes]``, not smoothed: the model does that.

    Draws from numpy's global generator.

    Args:
        pixels: ``[B, C, H, W]`` floating point, written in place; B is even.
        targets: ``[B]`` int64.
        mixup, cutmix: alpha of either, 0 for none; of both, each is drawn half of the time.
    """
    from timm.data import Mixup

    mixed, shares = Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=num_classes)(pixels, targets)
    return mixed, shares.to(mixed.dtype)
