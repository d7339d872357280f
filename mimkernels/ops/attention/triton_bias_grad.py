"""Triton kernel of the gradient of an attention bias that images or heads share."""

from __future__ import annotations

import triton
import triton.language as tl

from mimkernels.ops._triton import narrow
from mimkernels.ops.attention.triton_blocks import INTEGERS, load_head, load_levels, load_row
from mimkernels.ops.attention.triton_bwd import score_gradient


@triton.jit(do_not_specialize=INTEGERS)
def attention_dbias_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    lse_ptr,
    low_ptr,
    delta_ptr,
    coef_ptr,
    bias_ptr,
    mask_ptr,
    pos_ptr,
    dbias_ptr,
    scale,
    heads,
    queries,
    keys,
    num_prefix,
    row_blocks,
    key_blocks,
    shared_images,
    kept_heads,
    plane,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    g_stride_b,
    g_stride_n,
    g_stride_h,
    bias_stride_b,
    bias_stride_h,
    bias_stride_n,
    mask_stride_b,
    pos_stride_b,
    pos_stride_n,
    HAS_PREFIX: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DIMS: tl.constexpr,
    UNIT: tl.constexpr,
    BIAS_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    REFINE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # grid:     cdiv(Nk, BLOCK_N) * cdiv(Nq, BLOCK_M) * bias images * bias heads; a program owns one tile of dbias
    # in:       as attention_dq_kernel, whose delta it reads; shared_images images and heads / kept_heads heads share
    #           a tile
    # out:      dbias [B or 1, H or 1, Nq, Nk], contiguous, every element written once
    # numerics: fp32 sum of dS, images and then heads ascending; rounded once
    # bounds:   tails are masked at the store; offsets are int64
    # cost:     two products per tile, image and head; no atomics, deterministic
    pid = tl.program_id(0)
    first_col = pid % key_blocks * BLOCK_N
    first_row = pid // key_blocks % row_blocks * BLOCK_M
    kept = pid // key_blocks // row_blocks
    first_image = kept // kept_heads
    first_head = kept % kept_heads
    shared_heads = heads // kept_heads
    rows = first_row + tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    some = rows < queries
    q_stride_n = q_stride_n.to(tl.int64) * UNIT
    k_stride_n = k_stride_n.to(tl.int64) * UNIT
    v_stride_n = v_stride_n.to(tl.int64) * UNIT
    g_stride_n = g_stride_n.to(tl.int64) * UNIT
    bias_stride_n = bias_stride_n.to(tl.int64) * BIAS_UNIT
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i in tl.range(0, shared_images * shared_heads):
        b = (first_image + i // shared_heads).to(tl.int64)
        h = (first_head + i % shared_heads).to(tl.int64)
        place = (b * heads + h) * queries + rows
        q_block = q_ptr + (b * q_stride_b + h * q_stride_h) * UNIT + first_row * q_stride_n
        k_block = k_ptr + (b * k_stride_b + h * k_stride_h) * UNIT + first_col * k_stride_n
        v_block = v_ptr + (b * v_stride_b + h * v_stride_h) * UNIT + first_col * v_stride_n
        g_block = g_ptr + (b * g_stride_b + h * g_stride_h) * UNIT + first_row * g_stride_n
        bias_head = bias_ptr + (b * bias_stride_b + h * bias_stride_h) * BIAS_UNIT
        mask_row = None
        if mask_ptr is not None:
            mask_row = mask_ptr + b * mask_stride_b
        pos_image = None
        if pos_ptr is not None:
            pos_image = pos_ptr + b * pos_stride_b
        lse, low = load_levels(lse_ptr, low_ptr, place, some, EXACT)
        delta = load_row(delta_ptr, place, some)
        q0, q1 = load_head(q_block, queries - first_row, q_stride_n, D, D0, D1, BLOCK_M, True)
        g0, g1 = load_head(g_block, queries - first_row, g_stride_n, D, D0, D1, BLOCK_M, True)
        k0, k1 = load_head(k_block, keys - first_col, k_stride_n, D, D0, D1, BLOCK_N, True)
        v0, v1 = load_head(v_block, keys - first_col, v_stride_n, D, D0, D1, BLOCK_N, True)
        _, ds, _ = score_gradient(
            q0, q1, k0, k1, v0, v1, g0, g1, rows, cols, lse, low, delta, some, place, plane,
            coef_ptr, bias_head, mask_row, pos_image, queries, keys, num_prefix, scale, bias_stride_n, pos_stride_n,
            HAS_PREFIX, False, False, D1, DIMS, PRECISION, EXACT,
        )  # fmt: skip
        acc += ds
    target = dbias_ptr + (kept.to(tl.int64) * queries + rows)[:, None] * keys + cols[None, :]
    tl.store(target, narrow(acc, dbias_ptr.dtype.element_ty), mask=some[:, None] & (cols < keys)[None, :])
