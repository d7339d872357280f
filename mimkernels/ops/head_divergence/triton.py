"""Triton kernel of head_divergence."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _triton
from mimkernels.ops.attention import triton_configs
from mimkernels.ops.attention.triton_blocks import (
    INTEGERS,
    added_bias,
    allowed_keys,
    architecture,
    dot_precision,
    head_bias,
    head_split,
    load_head,
    load_levels,
    load_row,
    power,
    precision_name,
    strides,
)
from mimkernels.ops.attention.triton_cosine import cosines, given_scores
from mimkernels.ops.attention.triton_low import lse_low


@triton.jit
def log_probabilities(
    q_head,
    k_head,
    lse_row,
    low_row,
    q_factor_ptr,
    k_factor_ptr,
    head,
    bias,
    rows,
    cols,
    allowed,
    queries,
    keys,
    first,
    start,
    scale,
    q_stride_n,
    k_stride_n,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # (log P or 0, whether the head sees the key) of a tile of one head.
    q0, q1 = load_head(q_head + first * q_stride_n, queries - first, q_stride_n, D, D0, D1, BLOCK_M, True)
    k0, k1 = load_head(k_head + start * k_stride_n, keys - start, k_stride_n, D, D0, D1, BLOCK_N, True)
    score = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if D1 > 0:
        score = tl.dot(q1, tl.trans(k1), score, input_precision=PRECISION)
    if q_factor_ptr is not None:
        of_rows = load_row(q_factor_ptr, head * queries + rows, rows < queries)
        score = cosines(score, of_rows, load_row(k_factor_ptr, head * keys + cols, cols < keys), False)
    lse, low = load_levels(lse_row, low_row, rows, rows < queries, True)
    if (bias[0] is not None) or (bias[1] is not None):
        inside = tl.minimum(rows, queries - 1)
        added = added_bias(bias, inside, cols, (cols < keys)[None, :], keys, False, True)
        log_p = tl.fma(score, scale, added) - lse[:, None] - low[:, None]
    else:
        log_p = tl.fma(score, scale, -lse[:, None]) - low[:, None]
    seen = allowed & (log_p != float("-inf"))
    return tl.where(seen, log_p, 0.0), seen


@triton.jit(do_not_specialize=INTEGERS)
def head_divergence_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    low_ptr,
    bias_ptr,
    table_ptr,
    index_ptr,
    q_factor_ptr,
    k_factor_ptr,
    mask_ptr,
    out_ptr,
    scale,
    heads,
    queries,
    keys,
    row_blocks,
    plane,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    bias_stride_b,
    bias_stride_h,
    bias_stride_n,
    windows,
    entries,
    mask_stride_b,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    UNIT: tl.constexpr,
    BIAS_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # grid:     cdiv(Nq, BLOCK_M) * B * H, heads fastest; a program compares BLOCK_M queries of one head with all
    #           heads
    # in:       q, k [B, H, N, D] by stride in units of UNIT elements, last stride 1; lse, lse_low fp32 [B, H, Nq]
    #           contiguous; bias [W, H, Nq, Nk] by stride (0 where broadcast), table [T, H] and index [Nq, Nk]
    #           contiguous and key mask [B, Nk], each or None
    # out:      out fp32 [row blocks, B, H, H] = sum of P^h (log P^h - log P^g) / Nq; contiguous, every element
    #           written once
    # numerics: fp32; logarithms are subtracted before they are weighted, so that equal heads give 0
    # bounds:   keys that do not exist, or that one of the two heads does not see, and queries beyond the last count
    #           nothing; offsets are int64
    # cost:     H + 1 score tiles per tile of P, from q and k in L2; no N x N memory, no atomics, deterministic
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    first = pid // heads % row_blocks * BLOCK_M
    b = (pid // heads // row_blocks).to(tl.int64)
    rows = first + tl.arange(0, BLOCK_M)
    others = tl.arange(0, BLOCK_H)
    q_stride_n = q_stride_n.to(tl.int64) * UNIT
    k_stride_n = k_stride_n.to(tl.int64) * UNIT
    q_image = q_ptr + b * q_stride_b * UNIT
    k_image = k_ptr + b * k_stride_b * UNIT
    lse_image = lse_ptr + b * heads * queries
    low_image = low_ptr + b * heads * queries
    bias = head_bias(
        bias_ptr, table_ptr, index_ptr, b, h, heads, windows, entries,
        bias_stride_b, bias_stride_h, bias_stride_n, BIAS_UNIT,
    )  # fmt: skip
    mask_row = None
    if mask_ptr is not None:
        mask_row = mask_ptr + b * mask_stride_b
    acc = tl.zeros([BLOCK_M, BLOCK_H], dtype=tl.float32)
    for block in tl.range(0, tl.cdiv(keys, BLOCK_N)):
        start = block * BLOCK_N
        cols = start + tl.arange(0, BLOCK_N)
        allowed = (rows < queries)[:, None] & allowed_keys(mask_row, cols, keys)[None, :]
        log_p, seen = log_probabilities(
            q_image + h * q_stride_h * UNIT, k_image + h * k_stride_h * UNIT, lse_image + h * queries,
            low_image + h * queries, q_factor_ptr, k_factor_ptr, b * heads + h, bias, rows, cols, allowed,
            queries, keys, first, start, scale,
            q_stride_n, k_stride_n, D, D0, D1, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        p = tl.where(seen, power(log_p, True), 0.0)
        for i in tl.range(0, heads):
            g = i + h * 0  # int64
            other_bias = head_bias(
                bias_ptr, table_ptr, index_ptr, b, g, heads, windows, entries,
                bias_stride_b, bias_stride_h, bias_stride_n, BIAS_UNIT,
            )  # fmt: skip
            log_other, other_seen = log_probabilities(
                q_image + g * q_stride_h * UNIT, k_image + g * k_stride_h * UNIT, lse_image + g * queries,
                low_image + g * queries, q_factor_ptr, k_factor_ptr, b * heads + g, other_bias, rows, cols, allowed,
                queries, keys, first, start, scale,
                q_stride_n, k_stride_n, D, D0, D1, PRECISION, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            row_sum = tl.sum(tl.where(other_seen, p * (log_p - log_other), 0.0), axis=1)
            acc += tl.where(others[None, :] == i, row_sum[:, None], 0.0)
    target = out_ptr + (pid // heads % row_blocks).to(tl.int64) * plane + (b * heads + h) * heads + others
    # The sum over queries may be infinite where the mean is not.
    tl.store(target, tl.sum(acc / queries, axis=0), mask=others < heads)


def head_divergence_fwd(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    key_mask: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
) -> Tensor:
    batch, heads, queries, dim = q.shape
    out = q.new_empty((batch, heads, heads), dtype=torch.float32)
    if queries == 0:
        return out.fill_(float("nan"))  # a mean over nothing
    if out.numel() == 0:
        return out
    d0, d1 = head_split(dim, q.dtype)
    target = (architecture(q.device), precision_name(q.dtype), d0 + d1, queries, False)
    config = triton_configs.committed("companion", *target)
    if bias_table is not None:
        config = triton_configs.beside_table(config, d0 + d1)
    row_blocks = triton.cdiv(queries, config.block_m)
    partial, out = _triton.partials(row_blocks, (batch, heads, heads), out)
    unit, of_qk = strides(q, k)
    given = given_scores("head_divergence", q, k, bias, bias_table, bias_index, logit_scale, scale)
    lse = lse.contiguous()
    _triton.launch(
        head_divergence_kernel,
        row_blocks * batch * heads,
        q,
        *(q, k, lse, lse_low(q, k, lse, given, key_mask), *given.tensors, key_mask, partial),
        *(given.scale, heads, queries, k.shape[2], row_blocks, out.numel()),
        *(*of_qk, *given.integers, 0 if key_mask is None else key_mask.stride(0)),
        D=dim,
        D0=d0,
        D1=d1,
        UNIT=unit,
        BIAS_UNIT=given.unit,
        PRECISION=dot_precision(q.dtype),
        BLOCK_H=max(16, triton.next_power_of_2(heads)),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return _triton.sum_partials(partial, out)
