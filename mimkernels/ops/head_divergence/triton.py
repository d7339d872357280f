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
    allowed_keys,
    architecture,
    bias_block,
    bias_strides,
    dot_precision,
    head_split,
    load_head,
    load_levels,
    power,
    precision_name,
    refuse_options,
    strides,
)
from mimkernels.ops.attention.triton_low import lse_low


@triton.jit
def log_probabilities(
    q_head,
    k_head,
    lse_row,
    low_row,
    bias_rows,
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
    lse, low = load_levels(lse_row, low_row, rows, rows < queries, True)
    if bias_rows is not None:
        bias = bias_block(bias_rows, cols, keys, True)
        log_p = tl.fma(score, scale, bias) - lse[:, None] - low[:, None]
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
    #           contiguous; bias [B, H, Nq, Nk] by stride (0 where broadcast) and key mask [B, Nk], each or None
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
    inside = tl.minimum(rows, queries - 1).to(tl.int64)
    others = tl.arange(0, BLOCK_H)
    q_stride_n = q_stride_n.to(tl.int64) * UNIT
    k_stride_n = k_stride_n.to(tl.int64) * UNIT
    q_image = q_ptr + b * q_stride_b * UNIT
    k_image = k_ptr + b * k_stride_b * UNIT
    lse_image = lse_ptr + b * heads * queries
    low_image = low_ptr + b * heads * queries
    bias_rows = None
    if bias_ptr is not None:
        bias_rows = bias_ptr + (b * bias_stride_b + h * bias_stride_h + inside * bias_stride_n) * BIAS_UNIT
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
            low_image + h * queries, bias_rows, rows, cols, allowed, queries, keys, first, start, scale,
            q_stride_n, k_stride_n, D, D0, D1, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        p = tl.where(seen, power(log_p, True), 0.0)
        for i in tl.range(0, heads):
            g = i + h * 0  # int64
            other_rows = None
            if bias_ptr is not None:
                other_rows = bias_ptr + (b * bias_stride_b + g * bias_stride_h + inside * bias_stride_n) * BIAS_UNIT
            log_other, other_seen = log_probabilities(
                q_image + g * q_stride_h * UNIT, k_image + g * k_stride_h * UNIT, lse_image + g * queries,
                low_image + g * queries, other_rows, rows, cols, allowed, queries, keys, first, start, scale,
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
    refuse_options("head_divergence", q, bias, bias_table, logit_scale)
    batch, heads, queries, dim = q.shape
    out = q.new_empty((batch, heads, heads), dtype=torch.float32)
    if queries == 0:
        return out.fill_(float("nan"))  # a mean over nothing
    if out.numel() == 0:
        return out
    d0, d1 = head_split(dim, q.dtype)
    target = (architecture(q.device), precision_name(q.dtype), d0 + d1, queries, False)
    config = triton_configs.committed("companion", *target)
    row_blocks = triton.cdiv(queries, config.block_m)
    partial, out = _triton.partials(row_blocks, (batch, heads, heads), out)
    unit, of_qk = strides(q, k)
    bias_unit, of_bias = bias_strides(bias)
    lse = lse.contiguous()
    _triton.launch(
        head_divergence_kernel,
        row_blocks * batch * heads,
        q,
        *(q, k, lse, lse_low(q, k, lse, bias, key_mask, scale), bias, key_mask, partial),
        *(scale, heads, queries, k.shape[2], row_blocks, out.numel()),
        *(*of_qk, *of_bias, 0 if key_mask is None else key_mask.stride(0)),
        D=dim,
        D0=d0,
        D1=d1,
        UNIT=unit,
        BIAS_UNIT=bias_unit,
        PRECISION=dot_precision(q.dtype),
        BLOCK_H=max(16, triton.next_power_of_2(heads)),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return _triton.sum_partials(partial, out)
