"""Triton kernels of add_layer_norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _triton
from mimkernels.ops._triton import add_rows, add_term, narrow, store_sum, widen

# A row of up to MAX_BLOCK channels (half as many where they are not read by 16 bytes) stays in registers; a longer one
# is read again for every pass, CHUNK at a time.
MAX_BLOCK, CHUNK = 4096, 1024
# Elements that each of a program's threads holds of a tensor. The backward pass keeps six sums of each besides.
FWD_ELEMENTS, BWD_ELEMENTS = 16, 8
# Rows whose sums over the columns are one partial sum, at least: these are written and read again in fp32.
LEAST_GROUP = 16


@triton.jit
def vector(ptr, cols, cols_ok, otherwise: tl.constexpr, BLOCK_C: tl.constexpr):
    # [1, BLOCK_C] of a layer's parameter, which may be None.
    if ptr is not None:
        return tl.load(ptr + cols, mask=cols_ok, other=0.0)[None, :]
    else:
        return tl.full([1, BLOCK_C], otherwise, dtype=tl.float32)


@triton.jit
def matrix(ptr, image, token, stride_a, stride_r, cols, mask):
    # Columns `cols` of rows [image, token] in fp32; zeros where masked, and of a tensor that is None.
    if ptr is not None:
        source = ptr + (image * stride_a + token * stride_r)[:, None] + cols[None, :]
        return widen(tl.load(source, mask=mask, other=0.0))
    else:
        return tl.zeros(mask.shape, dtype=tl.float32)


@triton.jit
def row_factor(drop_ptr, image, rows_ok, BLOCK_R: tl.constexpr):
    # [BLOCK_R, 1]: of each row's image, or 1.
    if drop_ptr is not None:
        return tl.load(drop_ptr + image, mask=rows_ok, other=0.0)[:, None]
    else:
        return tl.full([BLOCK_R, 1], 1.0, dtype=tl.float32)


@triton.jit
def add_branch(
    x_ptr,
    y_ptr,
    scale_ptr,
    factor,
    image,
    token,
    x_stride_a,
    x_stride_r,
    y_stride_a,
    y_stride_r,
    cols,
    cols_ok,
    mask,
    BLOCK_C: tl.constexpr,
):
    # x + drop * scale * y, rounded to x's dtype, in fp32.
    value = matrix(x_ptr, image, token, x_stride_a, x_stride_r, cols, mask)
    if y_ptr is not None:
        y = matrix(y_ptr, image, token, y_stride_a, y_stride_r, cols, mask)
        value += factor * vector(scale_ptr, cols, cols_ok, 1.0, BLOCK_C) * y
        value = widen(narrow(value, x_ptr.dtype.element_ty))
    return value


@triton.jit
def inverse_deviation(shift, squares, eps):
    # 1 / sqrt(variance + eps) of the mean deviation from a number and the mean of their squares. A NaN remains.
    variance = squares - shift * shift
    variance = tl.where(variance < 0.0, 0.0, variance) + eps
    return tl.math.div_rn(1.0 + variance * 0.0, tl.sqrt_rn(variance))


@triton.jit(do_not_specialize=_triton.SIZES)
def add_layer_norm_fwd_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    drop_ptr,
    residual_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    tokens,
    columns,
    x_stride_a,
    x_stride_r,
    y_stride_a,
    y_stride_r,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # grid:     cdiv(A * R, BLOCK_R); a program owns BLOCK_R rows
    # in:       x and y [A, R, C] by stride, last stride 1; weight, bias, scale fp32 [C], drop fp32 [A]; all but x may
    #           be None
    # out:      residual [A, R, C] or None, out [A, R, C], mean and rstd fp32 [A, R]; contiguous, every element written
    #           once
    # numerics: fp32; the residual is rounded before it is normalised; mean by a tree, then, from the registers, what it
    #           lacks and the variance about it
    # bounds:   C <= BLOCK_C; row and column tails are masked; offsets are int64
    # cost:     x and y read once, residual and out written once
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows_ok = row < rows
    cols = tl.arange(0, BLOCK_C)
    cols_ok = cols < columns
    mask = rows_ok[:, None] & cols_ok[None, :]
    image, token = row // tokens, row % tokens
    factor = row_factor(drop_ptr, image, rows_ok, BLOCK_R)
    strides = (x_stride_a, x_stride_r, y_stride_a, y_stride_r)
    value = add_branch(x_ptr, y_ptr, scale_ptr, factor, image, token, *strides, cols, cols_ok, mask, BLOCK_C)
    target = row[:, None] * columns + cols[None, :]
    if residual_ptr is not None:
        tl.store(residual_ptr + target, narrow(value, residual_ptr.dtype.element_ty), mask=mask)
    mean = tl.sum(value, axis=1) / columns
    value = tl.where(mask, value - mean[:, None], 0.0)
    shift = tl.sum(value, axis=1) / columns
    rstd = inverse_deviation(shift, tl.sum(value * value, axis=1) / columns, eps)
    value = (value - shift[:, None]) * rstd[:, None] * vector(weight_ptr, cols, cols_ok, 1.0, BLOCK_C)
    value += vector(bias_ptr, cols, cols_ok, 0.0, BLOCK_C)
    tl.store(out_ptr + target, narrow(value, out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean + shift, mask=rows_ok)
    tl.store(rstd_ptr + row, rstd, mask=rows_ok)


@triton.jit(do_not_specialize=_triton.SIZES)
def add_layer_norm_long_fwd_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    drop_ptr,
    residual_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    tokens,
    columns,
    x_stride_a,
    x_stride_r,
    y_stride_a,
    y_stride_r,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # As above, for rows of any length, BLOCK_R of them in chunks of BLOCK_C.
    #
    # numerics: chunks are added BLOCK_C apart, then by a tree
    # bounds:   the column tail is masked; offsets are int64
    # cost:     x and y read three times, from the cache as a rule
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows_ok = row < rows
    image, token = row // tokens, row % tokens
    factor = row_factor(drop_ptr, image, rows_ok, BLOCK_R)
    strides = (x_stride_a, x_stride_r, y_stride_a, y_stride_r)
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for first in range(0, columns, BLOCK_C):
        cols = first + tl.arange(0, BLOCK_C)
        cols_ok = cols < columns
        mask = rows_ok[:, None] & cols_ok[None, :]
        value = add_branch(x_ptr, y_ptr, scale_ptr, factor, image, token, *strides, cols, cols_ok, mask, BLOCK_C)
        if residual_ptr is not None:
            target = residual_ptr + row[:, None] * columns + cols[None, :]
            tl.store(target, narrow(value, residual_ptr.dtype.element_ty), mask=mask)
        total += value
    mean = tl.sum(total, axis=1) / columns
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    squares = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for first in range(0, columns, BLOCK_C):
        cols = first + tl.arange(0, BLOCK_C)
        cols_ok = cols < columns
        mask = rows_ok[:, None] & cols_ok[None, :]
        value = add_branch(x_ptr, y_ptr, scale_ptr, factor, image, token, *strides, cols, cols_ok, mask, BLOCK_C)
        value = tl.where(mask, value - mean[:, None], 0.0)
        total += value
        squares += value * value
    shift = tl.sum(total, axis=1) / columns
    rstd = inverse_deviation(shift, tl.sum(squares, axis=1) / columns, eps)
    for first in range(0, columns, BLOCK_C):
        cols = first + tl.arange(0, BLOCK_C)
        cols_ok = cols < columns
        mask = rows_ok[:, None] & cols_ok[None, :]
        value = add_branch(x_ptr, y_ptr, scale_ptr, factor, image, token, *strides, cols, cols_ok, mask, BLOCK_C)
        value = (value - mean[:, None] - shift[:, None]) * rstd[:, None]
        value = value * vector(weight_ptr, cols, cols_ok, 1.0, BLOCK_C)
        value += vector(bias_ptr, cols, cols_ok, 0.0, BLOCK_C)
        target = out_ptr + row[:, None] * columns + cols[None, :]
        tl.store(target, narrow(value, out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean + shift, mask=rows_ok)
    tl.store(rstd_ptr + row, rstd, mask=rows_ok)


@triton.jit(do_not_specialize=_triton.SIZES)
def add_layer_norm_means_kernel(
    grad_ptr,
    residual_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    means_ptr,
    rows,
    tokens,
    columns,
    grad_stride_a,
    grad_stride_r,
    residual_stride_a,
    residual_stride_r,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # grid:     cdiv(A * R, BLOCK_R); a program owns BLOCK_R rows
    # in:       grad, of the normalised rows, and residual [A, R, C] by stride, last stride 1; weight fp32 [C] or None;
    #           mean and rstd fp32 [A, R]
    # out:      means fp32 [2, A, R]: over each row, of g = grad * weight and of g times the normalised value; every
    #           element written once
    # numerics: fp32, columns are added BLOCK_C apart, then by a tree
    # bounds:   row and column tails are masked; offsets are int64
    # cost:     grad and residual read once
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows_ok = row < rows
    image, token = row // tokens, row % tokens
    mean = tl.load(mean_ptr + row, mask=rows_ok, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + row, mask=rows_ok, other=0.0)[:, None]
    plain = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    projected = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for first in range(0, columns, BLOCK_C):
        cols = first + tl.arange(0, BLOCK_C)
        cols_ok = cols < columns
        mask = rows_ok[:, None] & cols_ok[None, :]
        weighted = matrix(grad_ptr, image, token, grad_stride_a, grad_stride_r, cols, mask)
        weighted *= vector(weight_ptr, cols, cols_ok, 1.0, BLOCK_C)
        value = matrix(residual_ptr, image, token, residual_stride_a, residual_stride_r, cols, mask)
        plain += weighted
        projected += weighted * ((value - mean) * rstd)
    tl.store(means_ptr + row, tl.sum(plain, axis=1) / columns, mask=rows_ok)
    rest = means_ptr + tl.cast(rows, tl.int64)
    tl.store(rest + row, tl.sum(projected, axis=1) / columns, mask=rows_ok)


@triton.jit(do_not_specialize=_triton.SIZES)
def add_layer_norm_bwd_kernel(
    dresidual_ptr,
    grad_ptr,
    residual_ptr,
    y_ptr,
    weight_ptr,
    scale_ptr,
    drop_ptr,
    mean_ptr,
    rstd_ptr,
    means_ptr,
    dx_ptr,
    dy_ptr,
    dweight_ptr,
    dbias_ptr,
    dscale_ptr,
    rows,
    tokens,
    columns,
    per_group,
    chunks,
    dresidual_stride_a,
    dresidual_stride_r,
    grad_stride_a,
    grad_stride_r,
    residual_stride_a,
    residual_stride_r,
    y_stride_a,
    y_stride_r,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # grid:     groups * chunks; a program owns per_group blocks of BLOCK_R rows, BLOCK_C columns wide
    # in:       dresidual, grad (of the normalised rows), residual, y [A, R, C] by stride, last stride 1; weight and
    #           scale fp32 [C], drop fp32 [A]; all but residual may be None; mean and rstd fp32 [A, R]; means fp32
    #           [2, A, R] of add_layer_norm_means_kernel, or None if a single chunk has all columns
    # out:      dx and dy [A, R, C] or None; dweight, dbias and dscale [groups, C] partial sums, then what they have
    #           lost, or None; contiguous, every element written once
    # numerics: fp32, dx and dy rounded once; sums over rows BLOCK_R apart, then by a tree, compensated
    # bounds:   row and column tails are masked; offsets are int64
    # cost:     each input read once, dx and dy written once; no atomics, deterministic
    pid = tl.program_id(0)
    cols = pid % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    cols_ok = cols < columns
    group = (pid // chunks).to(tl.int64)
    weight = vector(weight_ptr, cols, cols_ok, 1.0, BLOCK_C)
    scale = vector(scale_ptr, cols, cols_ok, 1.0, BLOCK_C)
    zeros = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    dweight, dweight_lost = zeros, zeros
    dbias, dbias_lost = zeros, zeros
    dscale, dscale_lost = zeros, zeros
    for step in range(per_group):
        row = (group * per_group + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        rows_ok = row < rows
        mask = rows_ok[:, None] & cols_ok[None, :]
        image, token = row // tokens, row % tokens
        d = matrix(dresidual_ptr, image, token, dresidual_stride_a, dresidual_stride_r, cols, mask)
        if grad_ptr is not None:
            mean = tl.load(mean_ptr + row, mask=rows_ok, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + row, mask=rows_ok, other=0.0)[:, None]
            grad = matrix(grad_ptr, image, token, grad_stride_a, grad_stride_r, cols, mask)
            value = matrix(residual_ptr, image, token, residual_stride_a, residual_stride_r, cols, mask)
            value = (value - mean) * rstd
            weighted = grad * weight
            if means_ptr is None:
                plain = (tl.sum(weighted, axis=1) / columns)[:, None]
                projected = (tl.sum(weighted * value, axis=1) / columns)[:, None]
            else:
                plain = tl.load(means_ptr + row, mask=rows_ok, other=0.0)[:, None]
                rest = means_ptr + tl.cast(rows, tl.int64)
                projected = tl.load(rest + row, mask=rows_ok, other=0.0)[:, None]
            d += rstd * (weighted - plain - value * projected)
            if dweight_ptr is not None:
                dweight, dweight_lost = add_term(dweight, dweight_lost, grad * value, True)
            if dbias_ptr is not None:
                dbias, dbias_lost = add_term(dbias, dbias_lost, grad, True)
        target = row[:, None] * columns + cols[None, :]
        if dx_ptr is not None:
            tl.store(dx_ptr + target, narrow(d, dx_ptr.dtype.element_ty), mask=mask)
        d *= row_factor(drop_ptr, image, rows_ok, BLOCK_R)
        if dscale_ptr is not None:
            term = d * matrix(y_ptr, image, token, y_stride_a, y_stride_r, cols, mask)
            dscale, dscale_lost = add_term(dscale, dscale_lost, term, True)
        if dy_ptr is not None:
            tl.store(dy_ptr + target, narrow(d * scale, dy_ptr.dtype.element_ty), mask=mask)
    parts = tl.num_programs(0) // chunks
    at = group * columns + cols
    if dweight_ptr is not None:
        dweight_sum, dweight_rest = add_rows(dweight, dweight_lost, True)
        store_sum(dweight_ptr + at, dweight_sum, dweight_rest, parts, columns, cols_ok, True)
    if dbias_ptr is not None:
        dbias_sum, dbias_rest = add_rows(dbias, dbias_lost, True)
        store_sum(dbias_ptr + at, dbias_sum, dbias_rest, parts, columns, cols_ok, True)
    if dscale_ptr is not None:
        dscale_sum, dscale_rest = add_rows(dscale, dscale_lost, True)
        store_sum(dscale_ptr + at, dscale_sum, dscale_rest, parts, columns, cols_ok, True)


def add_layer_norm_fwd(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    drop: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, tokens, columns = x.shape
    rows = images * tokens
    residual = x.new_empty((0,) if y is None else x.shape)  # [A, R, C]
    out = x.new_empty(x.shape, dtype=out_dtype)
    mean = x.new_empty((images, tokens), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return residual, out, mean.fill_(float("nan")), rstd.fill_(float("nan"))
    block_r, block_c, warps = _block(rows, columns, FWD_ELEMENTS)
    _triton.launch(
        add_layer_norm_fwd_kernel if columns <= block_c else add_layer_norm_long_fwd_kernel,
        triton.cdiv(rows, block_r),
        x,
        *(x, y, weight, bias, scale, drop, None if y is None else residual, out, mean, rstd),
        *(rows, tokens, columns, *_strides(x), *_strides(y), eps),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=warps,
    )
    return residual, out, mean, rstd


def add_layer_norm_bwd(
    dresidual: Tensor | None,
    dnormalised: Tensor | None,
    residual: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    drop: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    y_dtype: torch.dtype,
    need_x: bool,
    need_y: bool,
    need_weight: bool,
    need_bias: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    images, tokens, columns = residual.shape
    rows = images * tokens
    needed = (need_weight, need_bias, need_scale)
    dx = residual.new_empty(residual.shape if need_x else (0,))
    dy = residual.new_empty(residual.shape if need_y else (0,), dtype=y_dtype)
    if residual.numel() == 0 or not (need_x or need_y or any(needed)):
        sums = [mean.new_zeros((columns,) if need else (0,)) for need in needed]
        return dx, dy, sums[0], sums[1], sums[2]
    block_r, block_c, warps = _block(rows, columns, BWD_ELEMENTS)
    means = None
    if columns > block_c and dnormalised is not None:
        means = mean.new_empty((2, images, tokens))
        means_r, means_c, means_warps = _block(rows, columns, FWD_ELEMENTS)
        _triton.launch(
            add_layer_norm_means_kernel,
            triton.cdiv(rows, means_r),
            residual,
            *(dnormalised, residual, weight, mean, rstd, means),
            *(rows, tokens, columns, *_strides(dnormalised), *_strides(residual)),
            BLOCK_R=means_r,
            BLOCK_C=means_c,
            num_warps=means_warps,
        )
    chunks = triton.cdiv(columns, block_c)
    least = triton.cdiv(LEAST_GROUP, block_r)  # blocks of a group
    groups, per_group = _triton.batch_groups(triton.cdiv(rows, block_r * least), chunks)
    partials: list[Tensor | None] = [None] * 3
    sums = [mean.new_empty(0) for _ in needed]
    for which, need in enumerate(needed):
        if need:
            partials[which], sums[which] = _triton.partials(groups, (columns,), mean, compensated=True)
    _triton.launch(
        add_layer_norm_bwd_kernel,
        groups * chunks,
        residual,
        *(dresidual, dnormalised, residual, y if need_scale else None, weight, scale, drop, mean, rstd, means),
        *(dx if need_x else None, dy if need_y else None, *partials),
        *(rows, tokens, columns, per_group * least, chunks),
        *(*_strides(dresidual), *_strides(dnormalised), *_strides(residual), *_strides(y)),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=warps,
    )
    dweight, dbias, dscale = (_triton.sum_partials(*pair) for pair in zip(partials, sums, strict=True))
    return dx, dy, dweight, dbias, dscale


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def _block(rows: int, columns: int, elements: int) -> tuple[int, int, int]:
    """(BLOCK_R, BLOCK_C, num_warps) where a thread holds up to `elements` of a tensor; all columns, if they are few."""
    most = MAX_BLOCK
    if columns % 16:
        # Element-wise accesses keep one 64-bit address each in registers.
        elements, most = elements // 2, most // 2
    block_c = max(16, triton.next_power_of_2(columns)) if columns <= most else CHUNK
    block_r = max(1, min(128 * elements // block_c, triton.next_power_of_2(rows)))
    return block_r, block_c, max(1, block_r * block_c // (32 * elements))
