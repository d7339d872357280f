"""Launches of query_pool's Triton kernels, which it shares with weighted_pool."""

from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops import _triton, _triton_one_pass, _triton_pool


def query_pool_fwd(
    x: Tensor, queries: Tensor, values: Tensor | None, mask: Tensor | None, scale: float, num_prefix: int, sliced: bool
) -> tuple[Tensor, Tensor]:
    batch, tokens, dim = x.shape
    groups = queries.shape[-2]
    pooled = x if values is None else values
    width = pooled.shape[2] // groups if sliced else pooled.shape[2]
    out = x.new_empty((batch, groups, width))
    weights = x.new_empty((batch, groups, tokens), dtype=torch.float32)
    if batch * groups == 0 or tokens == 0:
        return out.zero_(), weights
    if groups <= _triton_pool.FEW_QUERIES and 0 < max(dim, width) <= _triton_one_pass.MOST_COLUMNS and width > 0:
        _triton_one_pass.pool_in_one_pass(x, queries, values, mask, scale, num_prefix, sliced, out, weights)
        return out, weights
    scores = _triton_pool.dots(x, queries, mask, scale, num_prefix, False)
    _triton_pool.softmax(scores, mask, weights, None, True, num_prefix)
    if width > 0:
        _triton_pool.weigh(weights, pooled, mask, out, 1.0, num_prefix, sliced)
    return out, weights


def query_pool_bwd(
    dout: Tensor,
    dweights: Tensor | None,
    x: Tensor,
    queries: Tensor,
    values: Tensor | None,
    weights: Tensor,
    mask: Tensor | None,
    scale: float,
    num_prefix: int,
    sliced: bool,
    need_x: bool,
    need_queries: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_x else (0,))
    dqueries = x.new_empty(queries.shape if need_queries else (0,))
    dvalues = x.new_empty(values.shape if need_values and values is not None else (0,))
    if weights.numel() == 0:
        return dx.zero_(), dqueries.zero_(), dvalues.zero_()
    if need_x or need_queries:
        ds = _triton_pool.dots(x if values is None else values, dout, mask, 1.0, num_prefix, sliced)
        _triton_pool.score_gradients(ds, dweights, weights, mask, True, num_prefix)
    if dqueries.numel():
        if queries.dim() == 3:
            _triton_pool.weigh(ds, x, mask, dqueries, scale, num_prefix, False)
        else:
            partial, _ = _triton.partials(x.shape[0], tuple(queries.shape), x)
            of_images = partial.view(x.shape[0], *queries.shape)
            _triton_pool.weigh(ds, x, mask, of_images, scale, num_prefix, False)
            dqueries = _triton.sum_partials(partial, dqueries) if x.shape[0] > 1 else partial
    if dx.numel():
        pooled = (weights, dout) if values is None else None
        _triton_pool.spread((ds, queries, scale), pooled, mask, dx, num_prefix, sliced)
    if dvalues.numel():
        _triton_pool.spread(None, (weights, dout), mask, dvalues, num_prefix, sliced)
    return dx, dqueries, dvalues
