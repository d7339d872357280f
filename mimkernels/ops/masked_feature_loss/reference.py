from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mimkernels.ops import _checks

_LOSSES: tuple[Callable[..., Tensor], ...] = (F.mse_loss, F.l1_loss, F.smooth_l1_loss)
LEAST_SQUARE = 1e-16  # of the length of a vector whose cosine is taken


def masked_feature_loss(
    pred: Tensor,
    target: Tensor,
    ids: Tensor | None,
    layer_norm: bool,
    eps: float,
    kind: int,
    beta: float,
    mean: bool,
) -> Tensor:
    """The loss of ``pred [A, R, D]``; A is B of ``target [B, N, D]``, or 1 and ids count the tokens of all images."""
    widest = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    if ids is not None:
        if ids.shape[0] != target.shape[0]:
            target = target.flatten(0, 1)[None]
        _checks.in_range("masked_feature_loss", "ids", ids, target.shape[1])
        target = target.gather(1, ids[..., None].expand(-1, -1, target.shape[2]))
    pred, target = pred.to(widest), target.to(widest)
    if layer_norm:
        target = F.layer_norm(target, target.shape[-1:], eps=eps)
    if kind == len(_LOSSES):
        lengths = [x.square().sum(-1).clamp(min=LEAST_SQUARE).sqrt() for x in (pred, target)]
        loss = 1 - (pred * target).sum(-1) / (lengths[0] * lengths[1])
    else:
        options = {"beta": beta} if kind == 2 else {}
        loss = _LOSSES[kind](pred, target, reduction="none", **options).mean(dim=-1)  # [A, R]
    return loss.mean() if mean else loss
