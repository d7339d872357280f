"""Launches of weighted_pool's Triton kernels, which it shares with query_pool."""

from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops import _triton_pool


def weighted_pool_fwd(
    x: Tensor, scores: Tensor, mask: Tensor | None, normalize: bool, num_prefix: int
) -> tuple[Tensor, Tensor]:
    if scores.dim() == 2:
        out, weights = weighted_pool_fwd(x, scores.unsqueeze(1), mask, normalize, num_prefix)
        return out.squeeze(1), weights.squeeze(1)
    out = x.new_empty((*scores.shape[:2], x.shape[2]))
    weights = torch.empty_like(scores, memory_format=torch.contiguous_format)
    if weights.numel() == 0:
        return out.zero_(), weights
    _triton_pool.softmax(scores, mask, weights, None, normalize, num_prefix)
    if out.numel():
        _triton_pool.weigh(weights, x, mask, out, 1.0, num_prefix, False)
    return out, weights


def weighted_pool_bwd(
    dout: Tensor,
    dweights: Tensor | None,
    x: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    normalize: bool,
    num_prefix: int,
    need_x: bool,
    need_scores: bool,
) -> tuple[Tensor, Tensor]:
    if weights.dim() == 2:
        dweights = None if dweights is None else dweights.unsqueeze(1)
        gradients = (dout.unsqueeze(1), dweights, x, weights.unsqueeze(1), mask)
        dx, dscores = weighted_pool_bwd(*gradients, normalize, num_prefix, need_x, need_scores)
        return dx, dscores.squeeze(1) if need_scores else dscores
    dx = x.new_empty(x.shape if need_x else (0,))
    dscores = x.new_empty((0,), dtype=torch.float32)
    if weights.numel() == 0:
        return dx.zero_(), torch.empty_like(weights) if need_scores else dscores
    if need_scores:
        dscores = _triton_pool.dots(x, dout, mask, 1.0, num_prefix, False)
        _triton_pool.score_gradients(dscores, dweights, weights, mask, normalize, num_prefix)
    if dx.numel():
        _triton_pool.spread(None, (weights, dout), mask, dx, num_prefix, False)
    return dx, dscores
