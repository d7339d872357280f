"""Triton kernel of received_attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _triton
from mimkernels.ops._triton import INTERPRETED
from mimkernels.ops.attention import triton_configs
from mimkernels.ops.attention.triton_blocks import (
    INTEGERS,
    architecture,
    dot_precision,
    exponents,
    head_bias,
    head_split,
    load_head,
    load_levels,
    load_row,
    locate,
    power,
    precision_name,
    strides,
)
from mimkernels.ops.attention.triton_cosine import cosines, given_scores
from mimkernels.ops.attention.triton_low import lse_low


@triton.jit(do_not_specialize=INTEGERS)
def received_attention_kernel(
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
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # grid:     cdiv(Nk, BLOCK_N) * B * H, key blocks fastest; a program owns BLOCK_N keys of one head and sees all
    #           queries
    # in:       q, k [B, H, N, D] by stride in units of UNIT elements, last stride 1; lse, lse_low fp32 [B, H, Nq]
    #           contiguous; bias [W, H, Nq, Nk] by stride (0 where broadcast), table [T, H] and index [Nq, Nk]
    #           contiguous and key mask [B, Nk], each or None
    # out:      out fp32 [B, H, Nk] = mean over queries of P; contiguous, every element written once
    # numerics: fp32; P from lse and lse_low as in the backward of attention; blocks of queries are added in order,
    #           compensated
    # bounds:   queries beyond the last, and those that may attend nothing, have P = 0; offsets are int64
    # cost:     k read once, q cdiv(Nk, BLOCK_N) times; no atomics, deterministic
    head, b, h, first = locate(tl.program_id(0), heads, row_blocks, BLOCK_N)
    cols = first + tl.arange(0, BLOCK_N)
    q_stride_n = q_stride_n.to(tl.int64) * UNIT
    k_stride_n = k_stride_n.to(tl.int64) * UNIT
    q_head = q_ptr + (b * q_stride_b + h * q_stride_h) * UNIT
    k_block = k_ptr + (b * k_stride_b + h * k_stride_h) * UNIT + first * k_stride_n
    bias = head_bias(
        bias_ptr, table_ptr, index_ptr, b, h, heads, windows, entries,
        bias_stride_b, bias_stride_h, bias_stride_n, BIAS_UNIT,
    )  # fmt: skip
    mask_row = None
    if mask_ptr is not None:
        mask_row = mask_ptr + b * mask_stride_b
    k0, k1 = load_head(k_block, keys - first, k_stride_n, D, D0, D1, BLOCK_N, True)
    of_cols = None
    if k_factor_ptr is not None:
        of_cols = load_row(k_factor_ptr, head.to(tl.int64) * keys + cols, cols < keys)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    excess = tl.zeros([BLOCK_N], dtype=tl.float32)  # of total over the exact one
    for block in tl.range(0, tl.cdiv(queries, BLOCK_M)):
        start = block * BLOCK_M
        rows = start + tl.arange(0, BLOCK_M)
        lse, low = load_levels(lse_ptr, low_ptr, head.to(tl.int64) * queries + rows, rows < queries, EXACT)
        q0, q1 = load_head(q_head + start * q_stride_n, queries - start, q_stride_n, D, D0, D1, BLOCK_M, True)
        score = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if D1 > 0:
            score = tl.dot(q1, tl.trans(k1), score, input_precision=PRECISION)
        of_rows = None
        if q_factor_ptr is not None:
            of_rows = load_row(q_factor_ptr, head.to(tl.int64) * queries + rows, rows < queries)
        score = cosines(score, of_rows, of_cols, False)
        t = exponents(score, rows, cols, lse, low, bias, mask_row, queries, keys, scale, False, False, EXACT)
        p = power(t, EXACT)
        if INTERPRETED:
            p = p.to(tl.float64)  # whose sum of a block is a chain, and a tree on devices
        # Roundings of like rows all go one way, and would add up.
        part = tl.sum(p, axis=0).to(tl.float32) - excess
        following = total + part
        excess = (following - total) - part
        total = following
    tl.store(out_ptr + head.to(tl.int64) * keys + cols, total / queries, mask=cols < keys)


def received_attention_fwd(
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
    keys = k.shape[2]
    out = q.new_empty((batch, heads, keys), dtype=torch.float32)
    if queries == 0:
        return out.fill_(float("nan"))  # a mean over nothing
    if out.numel() == 0:
        return out
    d0, d1 = head_split(dim, q.dtype)
    target = (architecture(q.device), precision_name(q.dtype), d0 + d1, queries, False)
    config = triton_configs.committed("companion", *target)
    if bias_table is not None:
        config = triton_configs.beside_table(config, d0 + d1)
    key_blocks = triton.cdiv(keys, config.block_n)
    unit, of_qk = strides(q, k)
    given = given_scores("received_attention", q, k, bias, bias_table, bias_index, logit_scale, scale)
    precision = dot_precision(q.dtype)
    exact = q.dtype == torch.float32 and precision == "ieee"
    lse = lse.contiguous()
    _triton.launch(
        received_attention_kernel,
        key_blocks * batch * heads,
        q,
        *(q, k, lse, lse_low(q, k, lse, given, key_mask), *given.tensors, key_mask, out),
        *(given.scale, heads, queries, keys, key_blocks),
        *(*of_qk, *given.integers, 0 if key_mask is None else key_mask.stride(0)),
        D=dim,
        D0=d0,
        D1=d1,
        UNIT=unit,
        BIAS_UNIT=given.unit,
        PRECISION=precision,
        EXACT=exact,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out
