from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mimkernels.ops import _checks


def upsample_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    label_smoothing: float,
) -> tuple[Tensor]:
    """The mean loss, as a tuple: the kernels return beside it what their gradient needs."""
    _checks.in_range("upsample_cross_entropy", "labels", labels, logits.shape[1], ignore_index)
    size = labels.shape[1:]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.numel() == 0:
        full = wide[..., :1, :1].expand(*logits.shape[:2], *size)
    else:
        full = F.interpolate(wide, tuple(size), mode="bilinear", align_corners=align_corners)  # [B, C, H, W]
    weight = None if weight is None else weight.to(full.dtype)
    return (F.cross_entropy(full, labels, weight, ignore_index=ignore_index, label_smoothing=label_smoothing),)
