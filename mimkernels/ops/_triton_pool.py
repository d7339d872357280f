"""Triton kernels of query_pool and weighted_pool.

Scores ``[B, G, N]`` come from queries or are given; a softmax over the allowed tokens makes them weights; a weighted
sum pools the values. The backward runs the same products the other way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _triton
from mimkernels.ops._triton import narrow, widen

# Queries up to here get a program each, side by side, so that the tokens come from L2 after the first; more of them
# share matrix products.
FEW_QUERIES = 4
# Rows of queries and tokens, and columns, of the matrix products; fp32 on the ordinary cores, exact.
BLOCK_G, BLOCK_T, BLOCK_K = 16, 32, 64


@triton.jit
def allowed_tokens(n, b, mask_ptr, mask_stride, num_prefix, end):
    # Which of the tokens n of image b may be pooled; none from `end` on.
    ok = (n >= num_prefix) & (n < end)
    if mask_ptr is not None:
        ok = ok & (tl.load(mask_ptr + b * mask_stride + n, mask=ok, other=0) != 0)
    return ok


@triton.jit(do_not_specialize=_triton.SIZES)
def pool_softmax_kernel(
    scores_ptr,
    mask_ptr,
    weights_ptr,
    level_ptr,
    groups,
    tokens,
    num_prefix,
    scores_stride_b,
    scores_stride_g,
    mask_stride,
    NORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # grid:     B * G; a program owns one row of scores
    # in:       scores fp32 [B, G, N] by stride, last stride 1; mask [B, N] bool or None
    # out:      weights fp32 [B, G, N], zero on tokens that are not allowed; level fp32 [B, G, 2] or None: the largest
    #           score (0 if it is -inf) and 1 / the sum of exponentials (0 if that is 0); every element written once.
    #           weights may be scores
    # numerics: fp32
    # bounds:   the tail is masked; offsets are int64
    # cost:     scores read twice, the second time from L1 or L2; no atomics, deterministic
    row = tl.program_id(0).to(tl.int64)
    b = row // groups
    scores = scores_ptr + b * scores_stride_b + row % groups * scores_stride_g
    level = 0.0
    inverse = 1.0
    if NORMALIZE:
        most = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
        for start in range(0, tokens, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            ok = allowed_tokens(n, b, mask_ptr, mask_stride, num_prefix, tokens)
            most = tl.maximum(most, tl.load(scores + n, mask=ok, other=float("-inf")))
        level = tl.max(most, axis=0)
        level = tl.where(level == float("-inf"), 0.0, level)
        total = tl.zeros([BLOCK_N], dtype=tl.float32)
        for start in range(0, tokens, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            ok = allowed_tokens(n, b, mask_ptr, mask_stride, num_prefix, tokens)
            total += tl.exp(tl.load(scores + n, mask=ok, other=float("-inf")) - level)
        sum_all = tl.sum(total, axis=0)
        inverse = tl.where(sum_all == 0.0, 0.0, 1.0 / tl.where(sum_all == 0.0, 1.0, sum_all))
    for start in range(0, tokens, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        ok = allowed_tokens(n, b, mask_ptr, mask_stride, num_prefix, tokens)
        score = tl.load(scores + n, mask=ok, other=0.0)
        if NORMALIZE:
            score = tl.exp(score - level) * inverse
        tl.store(weights_ptr + row * tokens + n, tl.where(ok, score, 0.0), mask=n < tokens)
    if level_ptr is not None:
        tl.store(level_ptr + 2 * row, level)
        tl.store(level_ptr + 2 * row + 1, inverse)


@triton.jit(do_not_specialize=_triton.SIZES)
def pool_softmax_bwd_kernel(
    ds_ptr,
    dweights_ptr,
    weights_ptr,
    mask_ptr,
    groups,
    tokens,
    num_prefix,
    dweights_stride_b,
    dweights_stride_g,
    mask_stride,
    NORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # grid:     B * G; a program owns one row of scores
    # in:       ds fp32 [B, G, N] holding dout . values; dweights fp32 [B, G, N] by stride or None; weights fp32
    #           [B, G, N]; mask [B, N] bool or None
    # out:      ds, in place: the gradient of the scores, zero on tokens that are not allowed; every element written
    #           once
    # numerics: fp32; the sum over tokens is subtracted before the product with the weight
    # bounds:   the tail is masked; offsets are int64
    # cost:     ds, dweights and weights read twice, the second time from L1 or L2; no atomics, deterministic
    row = tl.program_id(0).to(tl.int64)
    b = row // groups
    dweights = dweights_ptr
    if dweights_ptr is not None:
        dweights = dweights_ptr + b * dweights_stride_b + row % groups * dweights_stride_g
    sum_all = 0.0
    if NORMALIZE:
        total = tl.zeros([BLOCK_N], dtype=tl.float32)
        for start in range(0, tokens, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            ok = allowed_tokens(n, b, mask_ptr, mask_stride, num_prefix, tokens)
            da = tl.load(ds_ptr + row * tokens + n, mask=ok, other=0.0)
            if dweights_ptr is not None:
                da += tl.load(dweights + n, mask=ok, other=0.0)
            total += da * tl.load(weights_ptr + row * tokens + n, mask=ok, other=0.0)
        sum_all = tl.sum(total, axis=0)
    for start in range(0, tokens, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        ok = allowed_tokens(n, b, mask_ptr, mask_stride, num_prefix, tokens)
        da = tl.load(ds_ptr + row * tokens + n, mask=ok, other=0.0)
        if dweights_ptr is not None:
            da += tl.load(dweights + n, mask=ok, other=0.0)
        if NORMALIZE:
            da = tl.load(weights_ptr + row * tokens + n, mask=ok, other=0.0) * (da - sum_all)
        tl.store(ds_ptr + row * tokens + n, tl.where(ok, da, 0.0), mask=n < tokens)


@triton.jit(do_not_specialize=_triton.SIZES)
def pool_dots_kernel(
    x_ptr,
    vectors_ptr,
    mask_ptr,
    out_ptr,
    scale,
    groups,
    tokens,
    dim,
    num_prefix,
    token_blocks,
    group_blocks,
    x_stride_b,
    x_stride_n,
    vectors_stride_b,
    vectors_stride_g,
    slice_columns,
    mask_stride,
    PRODUCT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    # grid:     B * token_blocks * group_blocks, groups fastest; a program owns BLOCK_N tokens and BLOCK_G vectors (one
    #           where PRODUCT is false)
    # in:       x [B, N, >= dim], vectors [B, G, dim], by stride, last stride 1; vector g meets the columns of x from
    #           g * slice_columns on (0 where PRODUCT); mask [B, N] bool or None
    # out:      out fp32 [B, G, N] = scale * x . vectors, unspecified on tokens that are not allowed but written
    # numerics: fp32, columns block by block in order
    # bounds:   tails and tokens that are not allowed read as zeros; offsets are int64
    # cost:     x read group_blocks times, after the first from L2; no atomics, deterministic
    pid = tl.program_id(0)
    block_g = pid % group_blocks
    n = pid // group_blocks % token_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    b = (pid // group_blocks // token_blocks).to(tl.int64)
    ok = allowed_tokens(n, b, mask_ptr, mask_stride, num_prefix, tokens)
    x_rows = x_ptr + b * x_stride_b + n.to(tl.int64)[:, None] * x_stride_n
    if PRODUCT:
        g = block_g * BLOCK_G + tl.arange(0, BLOCK_G)
        vectors = vectors_ptr + b * vectors_stride_b + g.to(tl.int64)[None, :] * vectors_stride_g
        acc = tl.zeros([BLOCK_N, BLOCK_G], dtype=tl.float32)
        for start in range(0, dim, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            x = widen(tl.load(x_rows + cols[None, :], mask=ok[:, None] & (cols < dim)[None, :], other=0.0))
            mask = (cols < dim)[:, None] & (g < groups)[None, :]
            vector = widen(tl.load(vectors + cols[:, None], mask=mask, other=0.0))
            acc = tl.dot(x, vector, acc, input_precision="ieee")
        out = out_ptr + (b * groups + g)[None, :] * tokens + n[:, None]
        tl.store(out, acc * scale, mask=(n < tokens)[:, None] & (g < groups)[None, :])
    else:
        vector_row = vectors_ptr + b * vectors_stride_b + block_g.to(tl.int64) * vectors_stride_g
        x_rows += block_g * slice_columns
        sums = tl.zeros([BLOCK_N], dtype=tl.float32)
        for start in range(0, dim, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            x = widen(tl.load(x_rows + cols[None, :], mask=ok[:, None] & (cols < dim)[None, :], other=0.0))
            vector = widen(tl.load(vector_row + cols, mask=cols < dim, other=0.0))
            sums += tl.sum(x * vector[None, :], axis=1)
        tl.store(out_ptr + (b * groups + block_g) * tokens + n, sums * scale, mask=n < tokens)


@triton.jit(do_not_specialize=_triton.SIZES)
def pool_weigh_kernel(
    weights_ptr,
    x_ptr,
    mask_ptr,
    out_ptr,
    scale,
    groups,
    tokens,
    width,
    num_prefix,
    group_blocks,
    column_blocks,
    x_stride_b,
    x_stride_n,
    slice_width,
    mask_stride,
    PRODUCT: tl.constexpr,
    SLICED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    # grid:     B * group_blocks * column_blocks; a program owns BLOCK_G rows (one where PRODUCT is false, all of them
    #           where SLICED), BLOCK_D columns wide, and loops over the tokens
    # in:       weights fp32 [B, G, N], zero on tokens that are not allowed; x [B, N, W] by stride, last stride 1; mask
    #           [B, N] bool or None
    # out:      out [B, G, W] = scale * weights x, or, where SLICED, [B, W], column c with the weights of row
    #           c // slice_width; every element written once
    # numerics: fp32, tokens block by block in order, rounded once
    # bounds:   tails and tokens that are not allowed read as zeros; offsets are int64
    # cost:     x read group_blocks times, after the first from L2; no atomics, deterministic
    pid = tl.program_id(0)
    cols = pid % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    block_g = pid // column_blocks % group_blocks
    b = (pid // column_blocks // group_blocks).to(tl.int64)
    x_image = x_ptr + b * x_stride_b
    cols_ok = cols < width
    if PRODUCT:
        g = block_g * BLOCK_G + tl.arange(0, BLOCK_G)
        rows = (b * groups + g)[:, None]
        acc = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
        for start in range(0, tokens, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            ok = allowed_tokens(n, b, mask_ptr, mask_stride, num_prefix, tokens)
            mask = (g < groups)[:, None] & ok[None, :]
            weight = tl.load(weights_ptr + rows * tokens + n[None, :], mask=mask, other=0.0)
            at = x_image + n.to(tl.int64)[:, None] * x_stride_n + cols[None, :]
            x = widen(tl.load(at, mask=ok[:, None] & cols_ok[None, :], other=0.0))
            acc = tl.dot(weight, x, acc, input_precision="ieee")
        mask = (g < groups)[:, None] & cols_ok[None, :]
        tl.store(out_ptr + rows * width + cols[None, :], narrow(acc * scale, out_ptr.dtype.element_ty), mask=mask)
    else:
        sums = tl.zeros([BLOCK_D], dtype=tl.float32)
        for start in range(0, tokens, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            ok = allowed_tokens(n, b, mask_ptr, mask_stride, num_prefix, tokens)
            at = x_image + n.to(tl.int64)[:, None] * x_stride_n + cols[None, :]
            mask = ok[:, None] & cols_ok[None, :]
            x = widen(tl.load(at, mask=mask, other=0.0))
            if SLICED:
                rows = b * groups + cols // slice_width
                weight = tl.load(weights_ptr + rows[None, :] * tokens + n[:, None], mask=mask, other=0.0)
                sums += tl.sum(weight * x, axis=0)
            else:
                weight = tl.load(weights_ptr + (b * groups + block_g) * tokens + n, mask=ok, other=0.0)
                sums += tl.sum(weight[:, None] * x, axis=0)
        out = out_ptr + (b * group_blocks + block_g) * width + cols
        tl.store(out, narrow(sums * scale, out_ptr.dtype.element_ty), mask=cols_ok)


@triton.jit(do_not_specialize=_triton.SIZES)
def pool_spread_kernel(
    first_weights_ptr,
    first_ptr,
    second_weights_ptr,
    second_ptr,
    mask_ptr,
    out_ptr,
    first_scale,
    groups,
    tokens,
    dim,
    num_prefix,
    slice_width,
    token_blocks,
    column_blocks,
    first_stride_b,
    first_stride_g,
    second_stride_b,
    second_stride_g,
    mask_stride,
    SLICED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # grid:     B * token_blocks * column_blocks; a program owns BLOCK_N tokens, BLOCK_D columns wide
    # in:       weights fp32 [B, G, N]; vectors by stride, last stride 1: first [B, G, D] or None, second [B, G, D] or
    #           None, or [B, G, slice_width] where SLICED: row g holds columns [g * slice_width, (g + 1) * slice_width);
    #           mask [B, N] bool or None
    # out:      out [B, N, D] = first_scale * first_weights^T first + second_weights^T second, zero on tokens that are
    #           not allowed; every element written once
    # numerics: fp32, groups in order, rounded once
    # bounds:   tails are masked; offsets are int64
    # cost:     out written once; weights and vectors come from L1 and L2; no atomics, deterministic
    pid = tl.program_id(0)
    cols = pid % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    n = pid // column_blocks % token_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    b = (pid // column_blocks // token_blocks).to(tl.int64)
    n_ok = n < tokens
    cols_ok = cols < dim
    acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    if first_ptr is not None:
        for g in range(groups):
            weight = tl.load(first_weights_ptr + (b * groups + g) * tokens + n, mask=n_ok, other=0.0)
            vector = tl.load(first_ptr + b * first_stride_b + g * first_stride_g + cols, mask=cols_ok, other=0.0)
            acc += (weight * first_scale)[:, None] * widen(vector)[None, :]
    if second_ptr is not None:
        if SLICED:
            g = (cols // slice_width).to(tl.int64)
            at = second_weights_ptr + (b * groups + g)[None, :] * tokens + n[:, None]
            weight = tl.load(at, mask=n_ok[:, None] & cols_ok[None, :], other=0.0)
            place = b * second_stride_b + g * second_stride_g + cols % slice_width
            vector = widen(tl.load(second_ptr + place, mask=cols_ok, other=0.0))
            acc += weight * vector[None, :]
        else:
            for g in range(groups):
                weight = tl.load(second_weights_ptr + (b * groups + g) * tokens + n, mask=n_ok, other=0.0)
                at = second_ptr + b * second_stride_b + g * second_stride_g + cols
                acc += weight[:, None] * widen(tl.load(at, mask=cols_ok, other=0.0))[None, :]
    acc = tl.where(allowed_tokens(n, b, mask_ptr, mask_stride, num_prefix, tokens)[:, None], acc, 0.0)
    out = out_ptr + (b * tokens + n)[:, None] * dim + cols[None, :]
    tl.store(out, narrow(acc, out_ptr.dtype.element_ty), mask=n_ok[:, None] & cols_ok[None, :])


def _mask_stride(mask: Tensor | None) -> int:
    return 0 if mask is None else mask.stride(0)


def _image_stride(vectors: Tensor) -> tuple[int, int]:
    """Strides over images and rows of vectors ``[B, G, D]``, or ``[G, D]`` shared by the images."""
    return (0 if vectors.dim() == 2 else vectors.stride(0)), vectors.stride(-2)


def _tile(columns: int, elements: int = 4096, most: int = 1024) -> tuple[int, int]:
    """(rows, columns) of a tile of about ``elements``."""
    block_d = _triton.column_block(columns, most)
    return max(1, min(16, elements // block_d)), block_d


def softmax(
    scores: Tensor, mask: Tensor | None, weights: Tensor, level: Tensor | None, normalize: bool, num_prefix: int
) -> None:
    """Fill ``weights`` ``[B, G, N]`` from the scores, and ``level``."""
    batch, groups, tokens = weights.shape
    _triton.launch(
        pool_softmax_kernel,
        batch * groups,
        scores,
        *(scores, mask, weights, level, groups, tokens, num_prefix, scores.stride(0), scores.stride(1)),
        _mask_stride(mask),
        NORMALIZE=normalize,
        BLOCK_N=max(16, min(1024, triton.next_power_of_2(tokens))),
        num_warps=4,
    )


def score_gradients(
    ds: Tensor, dweights: Tensor | None, weights: Tensor, mask: Tensor | None, normalize: bool, num_prefix: int
) -> None:
    """``ds`` ``[B, G, N]`` from the gradient of the weights to that of the scores, in place."""
    batch, groups, tokens = weights.shape
    strides = (0, 0) if dweights is None else (dweights.stride(0), dweights.stride(1))
    _triton.launch(
        pool_softmax_bwd_kernel,
        batch * groups,
        ds,
        *(ds, dweights, weights, mask, groups, tokens, num_prefix, *strides, _mask_stride(mask)),
        NORMALIZE=normalize,
        BLOCK_N=max(16, min(1024, triton.next_power_of_2(tokens))),
        num_warps=4,
    )


def dots(x: Tensor, vectors: Tensor, mask: Tensor | None, scale: float, num_prefix: int, sliced: bool) -> Tensor:
    """fp32 ``[B, G, N]``: ``scale`` times the products of tokens and vectors, of slices of the tokens if ``sliced``."""
    batch, tokens, _ = x.shape
    groups, dim = vectors.shape[-2:]
    out = x.new_empty((batch, groups, tokens), dtype=torch.float32)
    product = groups > FEW_QUERIES and not sliced
    block_n, block_d = (BLOCK_T, BLOCK_K) if product else _tile(dim)
    block_g = BLOCK_G if product else 1
    token_blocks, group_blocks = triton.cdiv(tokens, block_n), triton.cdiv(groups, block_g)
    _triton.launch(
        pool_dots_kernel,
        batch * token_blocks * group_blocks,
        x,
        *(x, vectors, mask, out, scale, groups, tokens, dim, num_prefix, token_blocks, group_blocks),
        *(x.stride(0), x.stride(1), *_image_stride(vectors), dim if sliced else 0, _mask_stride(mask)),
        PRODUCT=product,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        BLOCK_G=block_g,
        num_warps=4,
    )
    return out


def weigh(
    weights: Tensor, x: Tensor, mask: Tensor | None, out: Tensor, scale: float, num_prefix: int, sliced: bool
) -> None:
    """``out`` ``[B, G, W]`` = ``scale`` times the sums of the tokens, or ``[B, G, W / G]`` of their slices."""
    batch, groups, tokens = weights.shape
    width = x.shape[2]
    product = groups > FEW_QUERIES and not sliced
    block_d = BLOCK_K if product else _triton.column_block(width, 256)
    block_n = BLOCK_T if product else max(1, min(triton.next_power_of_2(max(tokens, 1)), 4096 // block_d))
    block_g = BLOCK_G if product else 1
    group_blocks = 1 if sliced else triton.cdiv(groups, block_g)
    column_blocks = triton.cdiv(width, block_d)
    _triton.launch(
        pool_weigh_kernel,
        batch * group_blocks * column_blocks,
        x,
        *(weights, x, mask, out, scale, groups, tokens, width, num_prefix, group_blocks, column_blocks),
        *(x.stride(0), x.stride(1), width // groups, _mask_stride(mask)),
        PRODUCT=product,
        SLICED=sliced,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        BLOCK_G=block_g,
        num_warps=8 if product else 4,
    )


def spread(
    first: tuple[Tensor, Tensor, float] | None,
    second: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    out: Tensor,
    num_prefix: int,
    sliced: bool,
) -> None:
    """``out`` ``[B, N, D]`` from weights ``[B, G, N]`` and vectors; the second ones may be slices."""
    batch, tokens, dim = out.shape
    first_weights, first_vectors, scale = first or (None, None, 1.0)
    second_weights, second_vectors = second or (None, None)
    given = second or first
    assert given is not None
    groups = given[0].shape[1]
    block_n, block_d, warps = _triton.tile(batch, tokens, dim, itemsize=4)
    token_blocks, column_blocks = triton.cdiv(tokens, block_n), triton.cdiv(dim, block_d)
    _triton.launch(
        pool_spread_kernel,
        batch * token_blocks * column_blocks,
        out,
        *(first_weights, first_vectors, second_weights, second_vectors, mask, out, scale, groups, tokens, dim),
        num_prefix,
        *(second_vectors.shape[-1] if sliced and second_vectors is not None else 1, token_blocks, column_blocks),
        *((0, 0) if first_vectors is None else _image_stride(first_vectors)),
        *((0, 0) if second_vectors is None else _image_stride(second_vectors)),
        _mask_stride(mask),
        SLICED=sliced,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=warps,
    )
