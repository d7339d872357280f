"""Triton kernels of the gradients of an attention bias that images or heads share, and of a table of biases."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _triton
from mimkernels.ops._triton import INTERPRETED, add_term, narrow, rest
from mimkernels.ops.attention.triton_blocks import INTEGERS, head_bias, load_head, load_levels, load_row
from mimkernels.ops.attention.triton_gradient import score_gradient

ENTRIES = 64  # of a table that a program sums
SCORES = 4096 if INTERPRETED.value else 64  # whose gradients it compares with them at a time


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
    table_ptr,
    index_ptr,
    q_factor_ptr,
    k_factor_ptr,
    mask_ptr,
    pos_ptr,
    dbias_ptr,
    product_ptr,
    scale,
    heads,
    queries,
    keys,
    num_prefix,
    row_blocks,
    key_blocks,
    images,
    per_group,
    kept_windows,
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
    # grid:     cdiv(Nk, BLOCK_N) * cdiv(Nq, BLOCK_M) * kept_heads * kept_windows * groups; a program owns one tile of
    #           dbias and adds one group of per_group images
    # in:       as attention_dq_kernel, whose delta it reads; images of one number modulo kept_windows, and heads /
    #           kept_heads heads, share a tile
    # out:      dbias [groups, kept_windows, kept_heads, Nq, Nk], or None; product fp32, or None: each program's sum of
    #           dS times the cosines' part of S; contiguous, every element written once
    # numerics: fp32 sum of dS, images and then heads ascending; rounded once
    # bounds:   tails are masked at the store; offsets are int64
    # cost:     two products per tile, image and head; no atomics, deterministic
    pid = tl.program_id(0)
    first_col = pid % key_blocks * BLOCK_N
    first_row = pid // key_blocks % row_blocks * BLOCK_M
    kept = pid // key_blocks // row_blocks
    first_head = kept % kept_heads
    window = kept // kept_heads % kept_windows
    member = kept // kept_heads // kept_windows * per_group  # of the images of the window
    members = tl.minimum(per_group, images // kept_windows - member)
    shared_heads = heads // kept_heads
    rows = first_row + tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    some = rows < queries
    q_stride_n = q_stride_n.to(tl.int64) * UNIT
    k_stride_n = k_stride_n.to(tl.int64) * UNIT
    v_stride_n = v_stride_n.to(tl.int64) * UNIT
    g_stride_n = g_stride_n.to(tl.int64) * UNIT
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    product = scale * 0.0
    lost = product
    for i in tl.range(0, members * shared_heads):
        b = (window + (member + i // shared_heads) * kept_windows).to(tl.int64)
        h = (first_head + i % shared_heads).to(tl.int64)
        place = (b * heads + h) * queries + rows
        q_block = q_ptr + (b * q_stride_b + h * q_stride_h) * UNIT + first_row * q_stride_n
        k_block = k_ptr + (b * k_stride_b + h * k_stride_h) * UNIT + first_col * k_stride_n
        v_block = v_ptr + (b * v_stride_b + h * v_stride_h) * UNIT + first_col * v_stride_n
        g_block = g_ptr + (b * g_stride_b + h * g_stride_h) * UNIT + first_row * g_stride_n
        of_rows = None
        of_cols = None
        if q_factor_ptr is not None:
            of_rows = load_row(q_factor_ptr, place, some)
            of_cols = load_row(k_factor_ptr, (b * heads + h) * keys + cols, cols < keys)
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
        delta = load_row(delta_ptr, place, some)
        q0, q1 = load_head(q_block, queries - first_row, q_stride_n, D, D0, D1, BLOCK_M, True)
        g0, g1 = load_head(g_block, queries - first_row, g_stride_n, D, D0, D1, BLOCK_M, True)
        k0, k1 = load_head(k_block, keys - first_col, k_stride_n, D, D0, D1, BLOCK_N, True)
        v0, v1 = load_head(v_block, keys - first_col, v_stride_n, D, D0, D1, BLOCK_N, True)
        _, ds, _, cosine = score_gradient(
            q0, q1, k0, k1, v0, v1, g0, g1, rows, cols, lse, low, delta, some, place, plane,
            coef_ptr, of_rows, of_cols, bias, mask_row, pos_image, queries, keys, num_prefix,
            scale, pos_stride_n,
            HAS_PREFIX, False, False, D1, DIMS, PRECISION, EXACT,
        )  # fmt: skip
        acc += ds
        if product_ptr is not None:
            # Beyond the last key P is exp(-lse), infinite in rows of which a bias of -1e4 hides all keys.
            nothing = (ds == 0.0) | (cols >= keys)[None, :]
            part = tl.sum(tl.sum(tl.where(nothing, 0.0, ds * cosine), axis=1), axis=0)
            product, lost = add_term(product, lost, part, True)
    if product_ptr is not None:
        tl.store(product_ptr + pid, product + rest(lost))
    if dbias_ptr is not None:
        target = dbias_ptr + (kept.to(tl.int64) * queries + rows)[:, None] * keys + cols[None, :]
        tl.store(target, narrow(acc, dbias_ptr.dtype.element_ty), mask=some[:, None] & (cols < keys)[None, :])


@triton.jit(do_not_specialize=("heads", "scores", "entries", "entry_blocks"))
def attention_dtable_kernel(
    ds_ptr,
    index_ptr,
    dtable_ptr,
    heads,
    scores,
    entries,
    entry_blocks,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # grid:     cdiv(T, BLOCK_T) * H; a program owns BLOCK_T entries of one head
    # in:       ds fp32 [H, Nq * Nk], the sum over images, and index int64 [Nq * Nk], contiguous
    # out:      dtable [T, H], the sum of ds over the scores that an entry was added to; every element written once
    # numerics: fp32, compensated; blocks of scores ascending
    # bounds:   tails are masked; indices outside the table have no entry; offsets are int64
    # cost:     index read cdiv(T, BLOCK_T) * H times; ds only where a block of scores has an entry of the program's,
    #           which relative positions have in few; no atomics, deterministic
    pid = tl.program_id(0)
    h = (pid // entry_blocks).to(tl.int64)
    first = pid % entry_blocks * BLOCK_T
    owned = first + tl.arange(0, BLOCK_T)
    acc = tl.zeros([BLOCK_T], dtype=tl.float32)
    lost = tl.zeros([BLOCK_T], dtype=tl.float32)
    for start in tl.range(0, scores, BLOCK_S):
        at = start + tl.arange(0, BLOCK_S).to(tl.int64)
        index = tl.load(index_ptr + at, mask=at < scores, other=-1)
        if (tl.max(index, axis=0) >= first) & (tl.min(index, axis=0) < first + BLOCK_T):
            ds = tl.load(ds_ptr + h * scores + at, mask=at < scores, other=0.0)
            part = tl.sum(tl.where(owned[:, None] == index[None, :], ds[None, :], 0.0), axis=1)
            acc, lost = add_term(acc, lost, part, True)
    target = dtable_ptr + owned.to(tl.int64) * heads + h
    tl.store(target, narrow(acc + rest(lost), dtable_ptr.dtype.element_ty), mask=owned < entries)


def table_gradient(ds: Tensor, index: Tensor, table: Tensor) -> Tensor:
    """The gradient ``[T, H]`` of a table from that of scores summed over images, fp32 ``[1, H, Nq, Nk]``."""
    entries, heads = table.shape
    dtable = table.new_empty((entries, heads))
    if dtable.numel():
        blocks = triton.cdiv(entries, ENTRIES)
        args = (ds, index.contiguous(), dtable, heads, index.numel(), entries, blocks)
        _triton.launch(attention_dtable_kernel, blocks * heads, ds, *args, BLOCK_T=ENTRIES, BLOCK_S=SCORES)
    return dtable
