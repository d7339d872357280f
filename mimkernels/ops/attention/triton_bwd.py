"""Triton kernels of attention's gradients, through the output, the log-sum-exp and every row statistic."""

from __future__ import annotations

import triton
import triton.language as tl

from mimkernels.ops._triton import narrow
from mimkernels.ops.attention.triton_blocks import (
    INTEGERS,
    head_bias,
    load_head,
    load_levels,
    load_row,
    locate,
    store_rows,
)
from mimkernels.ops.attention.triton_cosine import factor_of, tangent
from mimkernels.ops.attention.triton_gradient import score_gradient


@triton.jit(do_not_specialize=INTEGERS)
def attention_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    out_ptr,
    lse_ptr,
    low_ptr,
    coef_ptr,
    bias_ptr,
    table_ptr,
    index_ptr,
    q_factor_ptr,
    k_factor_ptr,
    mask_ptr,
    pos_ptr,
    delta_ptr,
    dq_ptr,
    dbias_ptr,
    scale,
    heads,
    queries,
    keys,
    num_prefix,
    row_blocks,
    grad_heads,
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
    windows,
    entries,
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
    HAS_DELTA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # grid:     cdiv(Nq, BLOCK_M) * B * H, row blocks fastest; a program owns BLOCK_M queries of one head and sees all
    #           keys
    # in:       q, k, v [B, H, N, D] and g = dout [B, Nq, H, D] by stride in units of UNIT elements, last stride 1;
    #           out [B, Nq, H, D], lse [B, H, Nq] and coef [6, B, H, Nq] or None contiguous; bias, key mask and
    #           positions as forward
    # out:      dq [B, Nq, H, D], or a part of [B, N, 3, H, D]: tokens are grad_heads * D apart; delta fp32 [B, H, Nq]
    #           = sum of dout * out, or with REFINE what it is before out is rounded, sum of P * dP, and
    #           with HAS_DELTA read; dbias [B, H, Nq,
    #           Nk], where given; contiguous, every element written once
    # numerics: as attention_fwd_kernel; P from lse, dS rounded to the dtype of k
    # bounds:   keys beyond the last have P = 0; query tails are masked; offsets are int64
    # cost:     q, dout, out read once, k and v cdiv(Nq, BLOCK_M) times; no atomics, deterministic
    head, b, h, first = locate(tl.program_id(0), heads, row_blocks, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    some = rows < queries
    left = queries - first
    place = head.to(tl.int64) * queries + rows
    out_stride_n = heads.to(tl.int64) * D
    q_stride_n = q_stride_n.to(tl.int64) * UNIT
    k_stride_n = k_stride_n.to(tl.int64) * UNIT
    v_stride_n = v_stride_n.to(tl.int64) * UNIT
    g_stride_n = g_stride_n.to(tl.int64) * UNIT
    q_block = q_ptr + (b * q_stride_b + h * q_stride_h) * UNIT + first * q_stride_n
    k_head = k_ptr + (b * k_stride_b + h * k_stride_h) * UNIT
    v_head = v_ptr + (b * v_stride_b + h * v_stride_h) * UNIT
    g_block = g_ptr + (b * g_stride_b + h * g_stride_h) * UNIT + first * g_stride_n
    out_block = out_ptr + (b * queries + first) * out_stride_n + h * D
    bias = head_bias(
        bias_ptr, table_ptr, index_ptr, b, h, heads, windows, entries,
        bias_stride_b, bias_stride_h, bias_stride_n, BIAS_UNIT,
    )  # fmt: skip
    mask_row = None
    if mask_ptr is not None:
        mask_row = mask_ptr + b * mask_stride_b
    pos_image = None
    if pos_ptr is not None:
        pos_image = pos_ptr + b * pos_stride_b
    lse, low = load_levels(lse_ptr, low_ptr, place, some, EXACT)
    q0, q1 = load_head(q_block, left, q_stride_n, D, D0, D1, BLOCK_M, True)
    g0, g1 = load_head(g_block, left, g_stride_n, D, D0, D1, BLOCK_M, True)
    if HAS_DELTA:
        delta = load_row(delta_ptr, place, some)
    else:
        out0, out1 = load_head(out_block, left, out_stride_n, D, D0, D1, BLOCK_M, True)
        delta = tl.sum(g0.to(tl.float32) * out0.to(tl.float32), axis=1)
        if D1 > 0:
            delta += tl.sum(g1.to(tl.float32) * out1.to(tl.float32), axis=1)
    of_rows = None
    if q_factor_ptr is not None:
        of_rows = load_row(q_factor_ptr, place, some)
    key_place = head.to(tl.int64) * keys
    error = tl.zeros([BLOCK_M], dtype=tl.float32)
    dq0 = tl.zeros([BLOCK_M, D0], dtype=tl.float32)
    dq1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 16], dtype=tl.float32)
    full = keys // BLOCK_N
    # All but the last block are full.
    for block in tl.range(0, full):
        dq0, dq1, error = dq_step(
            dq0, dq1, error, q0, q1, g0, g1, rows, lse, low, delta, some, place, plane,
            k_head, v_head, coef_ptr, of_rows, k_factor_ptr, key_place, bias, mask_row, pos_image, dbias_ptr,
            block * BLOCK_N, queries, keys, num_prefix, scale,
            k_stride_n, v_stride_n, pos_stride_n,
            HAS_PREFIX, False, D, D0, D1, BLOCK_N, DIMS, PRECISION, EXACT, REFINE,
        )  # fmt: skip
    for block in tl.range(full, tl.cdiv(keys, BLOCK_N), num_stages=1):
        dq0, dq1, error = dq_step(
            dq0, dq1, error, q0, q1, g0, g1, rows, lse, low, delta, some, place, plane,
            k_head, v_head, coef_ptr, of_rows, k_factor_ptr, key_place, bias, mask_row, pos_image, dbias_ptr,
            block * BLOCK_N, queries, keys, num_prefix, scale,
            k_stride_n, v_stride_n, pos_stride_n,
            HAS_PREFIX, True, D, D0, D1, BLOCK_N, DIMS, PRECISION, EXACT, REFINE,
        )  # fmt: skip
    if not HAS_DELTA:
        tl.store(delta_ptr + place, delta + error, mask=some)
    grad_stride_n = grad_heads.to(tl.int64) * D
    dq_block = dq_ptr + (b * queries + first) * grad_stride_n + h * D
    dq0 *= scale
    dq1 *= scale
    if q_factor_ptr is not None:
        dq0, dq1 = tangent(dq0, dq1, q0, q1, of_rows, D1)
    store_rows(dq_block, dq0, left, grad_stride_n, 0, D0, D, BLOCK_M)
    if D1 > 0:
        store_rows(dq_block, dq1, left, grad_stride_n, D0, D1, D, BLOCK_M)


@triton.jit
def dq_step(
    dq0,
    dq1,
    error,
    q0,
    q1,
    g0,
    g1,
    rows,
    lse,
    low,
    delta,
    some,
    place,
    plane,
    k_head,
    v_head,
    coef_ptr,
    of_rows,
    k_factor_ptr,
    key_place,
    bias,
    mask_row,
    pos_image,
    dbias_ptr,
    start,
    queries,
    keys,
    num_prefix,
    scale,
    k_stride_n,
    v_stride_n,
    pos_stride_n,
    HAS_PREFIX: tl.constexpr,
    CHECK: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIMS: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    REFINE: tl.constexpr,
):
    # dq / scale and, with REFINE, the error of delta, plus what BLOCK_N keys from `start` add; stores their dbias.
    cols = start + tl.arange(0, BLOCK_N)
    k0, k1 = load_head(k_head + start * k_stride_n, keys - start, k_stride_n, D, D0, D1, BLOCK_N, CHECK)
    v0, v1 = load_head(v_head + start * v_stride_n, keys - start, v_stride_n, D, D0, D1, BLOCK_N, CHECK)
    of_cols = None
    if k_factor_ptr is not None:
        of_cols = load_row(k_factor_ptr, key_place + cols, cols < keys)
    _, ds, of_out, _score = score_gradient(
        q0, q1, k0, k1, v0, v1, g0, g1, rows, cols, lse, low, delta, some, place, plane,
        coef_ptr, of_rows, of_cols, bias, mask_row, pos_image, queries, keys, num_prefix, scale, pos_stride_n,
        HAS_PREFIX, False, CHECK, D1, DIMS, PRECISION, EXACT,
    )  # fmt: skip
    if dbias_ptr is not None:
        target = dbias_ptr + place[:, None] * keys + cols[None, :]
        tl.store(target, narrow(ds, dbias_ptr.dtype.element_ty), mask=some[:, None] & (cols < keys)[None, :])
    if REFINE:
        error += tl.sum(of_out, axis=1)
    ds = factor_of(ds, of_cols, k0.dtype, False, False)
    dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
    if D1 > 0:
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
    return dq0, dq1, error


@triton.jit(do_not_specialize=INTEGERS)
def attention_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    lse_ptr,
    low_ptr,
    delta_ptr,
    coef_ptr,
    bias_ptr,
    table_ptr,
    index_ptr,
    q_factor_ptr,
    k_factor_ptr,
    mask_ptr,
    pos_ptr,
    dk_ptr,
    dv_ptr,
    scale,
    heads,
    queries,
    keys,
    num_prefix,
    row_blocks,
    grad_heads,
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
    windows,
    entries,
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
    # grid:     cdiv(Nk, BLOCK_N) * B * H, key blocks fastest; a program owns BLOCK_N keys of one head and sees all
    #           queries
    # in:       as attention_dq_kernel, whose delta it reads
    # out:      dk, dv [B, Nk, H, D], or parts of [B, N, 3, H, D] as dq; every element written once
    # numerics: as attention_dq_kernel; tiles are [keys, queries], so that P and dS enter the products from registers.
    #           EXACT: [queries, keys] as in the forward kernel, so that scores have the same bits
    # bounds:   queries beyond the last have P = 0; key tails are masked at the store; offsets are int64
    # cost:     k and v read once, q and dout cdiv(Nk, BLOCK_N) times; no atomics, deterministic
    head, b, h, first = locate(tl.program_id(0), heads, row_blocks, BLOCK_N)
    cols = first + tl.arange(0, BLOCK_N)
    left = keys - first
    grad_stride_n = grad_heads.to(tl.int64) * D
    q_stride_n = q_stride_n.to(tl.int64) * UNIT
    k_stride_n = k_stride_n.to(tl.int64) * UNIT
    v_stride_n = v_stride_n.to(tl.int64) * UNIT
    g_stride_n = g_stride_n.to(tl.int64) * UNIT
    q_head = q_ptr + (b * q_stride_b + h * q_stride_h) * UNIT
    k_block = k_ptr + (b * k_stride_b + h * k_stride_h) * UNIT + first * k_stride_n
    v_block = v_ptr + (b * v_stride_b + h * v_stride_h) * UNIT + first * v_stride_n
    g_head = g_ptr + (b * g_stride_b + h * g_stride_h) * UNIT
    bias = head_bias(
        bias_ptr, table_ptr, index_ptr, b, h, heads, windows, entries,
        bias_stride_b, bias_stride_h, bias_stride_n, BIAS_UNIT,
    )  # fmt: skip
    mask_row = None
    if mask_ptr is not None:
        mask_row = mask_ptr + b * mask_stride_b
    pos_image = None
    if pos_ptr is not None:
        pos_image = pos_ptr + b * pos_stride_b
    TRANSPOSED: tl.constexpr = not EXACT
    k0, k1 = load_head(k_block, left, k_stride_n, D, D0, D1, BLOCK_N, True)
    v0, v1 = load_head(v_block, left, v_stride_n, D, D0, D1, BLOCK_N, True)
    of_cols = None
    if k_factor_ptr is not None:
        of_cols = load_row(k_factor_ptr, head.to(tl.int64) * keys + cols, cols < keys)
    dk0 = tl.zeros([BLOCK_N, D0], dtype=tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], dtype=tl.float32)
    dk1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else 16], dtype=tl.float32)
    dv1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else 16], dtype=tl.float32)
    for block in tl.range(0, tl.cdiv(queries, BLOCK_M)):
        start = block * BLOCK_M
        rows = start + tl.arange(0, BLOCK_M)
        some = rows < queries
        place = head.to(tl.int64) * queries + rows
        q0, q1 = load_head(q_head + start * q_stride_n, queries - start, q_stride_n, D, D0, D1, BLOCK_M, True)
        g0, g1 = load_head(g_head + start * g_stride_n, queries - start, g_stride_n, D, D0, D1, BLOCK_M, True)
        lse, low = load_levels(lse_ptr, low_ptr, place, some, EXACT)
        delta = load_row(delta_ptr, place, some)
        of_rows = None
        if q_factor_ptr is not None:
            of_rows = load_row(q_factor_ptr, place, some)
        p, ds, _, _score = score_gradient(
            q0, q1, k0, k1, v0, v1, g0, g1, rows, cols, lse, low, delta, some, place, plane,
            coef_ptr, of_rows, of_cols, bias, mask_row, pos_image, queries, keys, num_prefix, scale, pos_stride_n,
            HAS_PREFIX, TRANSPOSED, False, D1, DIMS, PRECISION, EXACT,
        )  # fmt: skip
        p = p.to(g0.dtype)
        ds = factor_of(ds, of_rows, q0.dtype, True, TRANSPOSED)
        if not TRANSPOSED:
            p = tl.trans(p)
            ds = tl.trans(ds)
        dv0 = tl.dot(p, g0, dv0, input_precision=PRECISION)
        dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
        if D1 > 0:
            dv1 = tl.dot(p, g1, dv1, input_precision=PRECISION)
            dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
    target = (b * keys + first) * grad_stride_n + h * D
    dk0 *= scale
    dk1 *= scale
    if k_factor_ptr is not None:
        dk0, dk1 = tangent(dk0, dk1, k0, k1, of_cols, D1)
    store_rows(dk_ptr + target, dk0, left, grad_stride_n, 0, D0, D, BLOCK_N)
    store_rows(dv_ptr + target, dv0, left, grad_stride_n, 0, D0, D, BLOCK_N)
    if D1 > 0:
        store_rows(dk_ptr + target, dk1, left, grad_stride_n, D0, D1, D, BLOCK_N)
        store_rows(dv_ptr + target, dv1, left, grad_stride_n, D0, D1, D, BLOCK_N)


@triton.jit(do_not_specialize=INTEGERS)
def attention_bwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    out_ptr,
    lse_ptr,
    low_ptr,
    coef_ptr,
    bias_ptr,
    table_ptr,
    index_ptr,
    q_factor_ptr,
    k_factor_ptr,
    mask_ptr,
    pos_ptr,
    delta_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    scale,
    heads,
    queries,
    keys,
    num_prefix,
    grad_heads,
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
    windows,
    entries,
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
    # grid:     B * H; a program owns one head whose queries fit one block, Nq <= BLOCK_M
    # in, out:  as attention_dq_kernel and attention_dkv_kernel together, without dbias; delta may be None
    # numerics: as theirs
    # bounds:   as theirs
    # cost:     every input read once, five products instead of seven; no atomics, deterministic
    head, b, h, _ = locate(tl.program_id(0), heads, 1, BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    some = rows < queries
    place = head.to(tl.int64) * queries + rows
    out_stride_n = heads.to(tl.int64) * D
    q_stride_n = q_stride_n.to(tl.int64) * UNIT
    k_stride_n = k_stride_n.to(tl.int64) * UNIT
    v_stride_n = v_stride_n.to(tl.int64) * UNIT
    g_stride_n = g_stride_n.to(tl.int64) * UNIT
    q_head = q_ptr + (b * q_stride_b + h * q_stride_h) * UNIT
    k_head = k_ptr + (b * k_stride_b + h * k_stride_h) * UNIT
    v_head = v_ptr + (b * v_stride_b + h * v_stride_h) * UNIT
    g_head = g_ptr + (b * g_stride_b + h * g_stride_h) * UNIT
    out_head = out_ptr + b * queries * out_stride_n + h * D
    bias = head_bias(
        bias_ptr, table_ptr, index_ptr, b, h, heads, windows, entries,
        bias_stride_b, bias_stride_h, bias_stride_n, BIAS_UNIT,
    )  # fmt: skip
    mask_row = None
    if mask_ptr is not None:
        mask_row = mask_ptr + b * mask_stride_b
    pos_image = None
    if pos_ptr is not None:
        pos_image = pos_ptr + b * pos_stride_b
    lse, low = load_levels(lse_ptr, low_ptr, place, some, EXACT)
    q0, q1 = load_head(q_head, queries, q_stride_n, D, D0, D1, BLOCK_M, True)
    g0, g1 = load_head(g_head, queries, g_stride_n, D, D0, D1, BLOCK_M, True)
    out0, out1 = load_head(out_head, queries, out_stride_n, D, D0, D1, BLOCK_M, True)
    delta = tl.sum(g0.to(tl.float32) * out0.to(tl.float32), axis=1)
    if D1 > 0:
        delta += tl.sum(g1.to(tl.float32) * out1.to(tl.float32), axis=1)
    of_rows = None
    if q_factor_ptr is not None:
        of_rows = load_row(q_factor_ptr, place, some)
    key_place = head.to(tl.int64) * keys
    error = tl.zeros([BLOCK_M], dtype=tl.float32)
    dq0 = tl.zeros([BLOCK_M, D0], dtype=tl.float32)
    dq1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 16], dtype=tl.float32)
    for block in tl.range(0, tl.cdiv(keys, BLOCK_N)):
        start = block * BLOCK_N
        left = keys - start
        cols = start + tl.arange(0, BLOCK_N)
        k0, k1 = load_head(k_head + start * k_stride_n, left, k_stride_n, D, D0, D1, BLOCK_N, True)
        v0, v1 = load_head(v_head + start * v_stride_n, left, v_stride_n, D, D0, D1, BLOCK_N, True)
        of_cols = None
        if k_factor_ptr is not None:
            of_cols = load_row(k_factor_ptr, key_place + cols, cols < keys)
        p, ds, of_out, _score = score_gradient(
            q0, q1, k0, k1, v0, v1, g0, g1, rows, cols, lse, low, delta, some, place, plane,
            coef_ptr, of_rows, of_cols, bias, mask_row, pos_image, queries, keys, num_prefix, scale, pos_stride_n,
            HAS_PREFIX, False, True, D1, DIMS, PRECISION, EXACT,
        )  # fmt: skip
        if REFINE:
            error += tl.sum(of_out, axis=1)
        p = tl.trans(p.to(g0.dtype))
        grad_stride_n = grad_heads.to(tl.int64) * D
        target = (b * keys + start) * grad_stride_n + h * D
        dv0 = tl.dot(p, g0, input_precision=PRECISION)
        store_rows(dv_ptr + target, dv0, left, grad_stride_n, 0, D0, D, BLOCK_N)
        for_keys = tl.trans(factor_of(ds, of_rows, q0.dtype, True, False))
        for_queries = factor_of(ds, of_cols, k0.dtype, False, False)
        dk0 = tl.dot(for_keys, q0, input_precision=PRECISION) * scale
        dk1 = dk0
        if D1 > 0:
            dv1 = tl.dot(p, g1, input_precision=PRECISION)
            store_rows(dv_ptr + target, dv1, left, grad_stride_n, D0, D1, D, BLOCK_N)
            dk1 = tl.dot(for_keys, q1, input_precision=PRECISION) * scale
        if k_factor_ptr is not None:
            dk0, dk1 = tangent(dk0, dk1, k0, k1, of_cols, D1)
        store_rows(dk_ptr + target, dk0, left, grad_stride_n, 0, D0, D, BLOCK_N)
        dq0 = tl.dot(for_queries, k0, dq0, input_precision=PRECISION)
        if D1 > 0:
            store_rows(dk_ptr + target, dk1, left, grad_stride_n, D0, D1, D, BLOCK_N)
            dq1 = tl.dot(for_queries, k1, dq1, input_precision=PRECISION)
    if delta_ptr is not None:
        tl.store(delta_ptr + place, delta + error, mask=some)
    grad_stride_n = grad_heads.to(tl.int64) * D
    dq_head = dq_ptr + b * queries * grad_stride_n + h * D
    dq0 *= scale
    dq1 *= scale
    if q_factor_ptr is not None:
        dq0, dq1 = tangent(dq0, dq1, q0, q1, of_rows, D1)
    store_rows(dq_head, dq0, queries, grad_stride_n, 0, D0, D, BLOCK_M)
    if D1 > 0:
        store_rows(dq_head, dq1, queries, grad_stride_n, D0, D1, D, BLOCK_M)
