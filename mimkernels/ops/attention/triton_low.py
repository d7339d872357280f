"""Triton kernel of what rounding took from lse, for ops that are given lse alone."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _triton
from mimkernels.ops.attention import triton_configs
from mimkernels.ops.attention.triton_blocks import (
    INTEGERS,
    LARGE_LSE,
    architecture,
    dot_precision,
    exponents,
    head_bias,
    head_split,
    load_head,
    load_row,
    locate,
    precision_name,
    strides,
)
from mimkernels.ops.attention.triton_cosine import GivenScores, cosines


@triton.jit(do_not_specialize=INTEGERS)
def lse_low_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    bias_ptr,
    table_ptr,
    index_ptr,
    q_factor_ptr,
    k_factor_ptr,
    mask_ptr,
    low_ptr,
    scale,
    heads,
    queries,
    keys,
    row_blocks,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # grid:     cdiv(Nq, BLOCK_M) * B * H, row blocks fastest; a program owns BLOCK_M queries of one head
    # in:       q, k [B, H, N, D] by stride in units of UNIT elements, last stride 1; lse fp32 [B, H, Nq] contiguous;
    #           bias [W, H, Nq, Nk] by stride (0 where broadcast), table [T, H] and index [Nq, Nk]
    #           contiguous and key mask [B, Nk], each or None
    # out:      low fp32 [B, H, Nq]: log of the sum over keys of exp(S - lse), 0 where lse is not large; contiguous,
    #           every element written once
    # numerics: fp32, relative to the row's maximum of S - lse
    # bounds:   tails are masked; offsets are int64
    # cost:     k cdiv(Nq, BLOCK_M) times, but nothing where no row of the block is large; no atomics, deterministic
    head, b, h, first = locate(tl.program_id(0), heads, row_blocks, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    place = head.to(tl.int64) * queries + rows
    lse = tl.load(lse_ptr + place, mask=rows < queries, other=0.0)
    large = (tl.abs(lse) > LARGE_LSE) & (tl.abs(lse) < float("inf"))
    low = tl.zeros([BLOCK_M], dtype=tl.float32)
    q_stride_n = q_stride_n.to(tl.int64) * UNIT
    k_stride_n = k_stride_n.to(tl.int64) * UNIT
    if tl.max(large.to(tl.int32), axis=0) > 0:
        q_block = q_ptr + (b * q_stride_b + h * q_stride_h) * UNIT + first * q_stride_n
        k_head = k_ptr + (b * k_stride_b + h * k_stride_h) * UNIT
        bias = head_bias(
            bias_ptr, table_ptr, index_ptr, b, h, heads, windows, entries,
            bias_stride_b, bias_stride_h, bias_stride_n, BIAS_UNIT,
        )  # fmt: skip
        mask_row = None
        if mask_ptr is not None:
            mask_row = mask_ptr + b * mask_stride_b
        of_rows = None
        if q_factor_ptr is not None:
            of_rows = load_row(q_factor_ptr, place, rows < queries)
        q0, q1 = load_head(q_block, queries - first, q_stride_n, D, D0, D1, BLOCK_M, True)
        level = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = low
        for block in tl.range(0, tl.cdiv(keys, BLOCK_N)):
            start = block * BLOCK_N
            cols = start + tl.arange(0, BLOCK_N)
            k0, k1 = load_head(k_head + start * k_stride_n, keys - start, k_stride_n, D, D0, D1, BLOCK_N, True)
            score = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
            if D1 > 0:
                score = tl.dot(q1, tl.trans(k1), score, input_precision=PRECISION)
            of_cols = None
            if k_factor_ptr is not None:
                of_cols = load_row(k_factor_ptr, head.to(tl.int64) * keys + cols, cols < keys)
            score = cosines(score, of_rows, of_cols, False)
            t = exponents(score, rows, cols, lse, low, bias, mask_row, queries, keys, scale, False, True, True)
            new_level = tl.maximum(level, tl.max(t, axis=1))
            base = tl.where(new_level == float("-inf"), 0.0, new_level)
            total = total * tl.exp(level - base) + tl.sum(tl.exp(t - base[:, None]), axis=1)
            level = new_level
        low = tl.where(large & (total > 0.0), level + tl.log(total), 0.0)
    tl.store(low_ptr + place, low, mask=rows < queries)


def lse_low(q: Tensor, k: Tensor, lse: Tensor, given: GivenScores, key_mask: Tensor | None) -> Tensor:
    """What rounding took from contiguous ``lse`` ``[B, H, Nq]``; queries and heads are not empty."""
    batch, heads, queries, dim = q.shape
    low = lse.new_empty(lse.shape)
    d0, d1 = head_split(dim, q.dtype)
    target = (architecture(q.device), precision_name(q.dtype), d0 + d1, queries, False)
    config = triton_configs.committed("companion", *target)
    if given.tensors[1] is not None:  # a table
        config = triton_configs.beside_table(config, d0 + d1)
    row_blocks = triton.cdiv(queries, config.block_m)
    unit, of_qk = strides(q, k)
    _triton.launch(
        lse_low_kernel,
        row_blocks * batch * heads,
        q,
        *(q, k, lse, *given.tensors, key_mask, low),
        *(given.scale, heads, queries, k.shape[2], row_blocks),
        *(*of_qk, *given.integers, 0 if key_mask is None else key_mask.stride(0)),
        D=dim,
        D0=d0,
        D1=d1,
        UNIT=unit,
        BIAS_UNIT=given.unit,
        PRECISION=dot_precision(q.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return low
