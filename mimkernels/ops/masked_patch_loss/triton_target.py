"""What the Triton kernels of masked_patch_loss share: targets, what counts, the loss and slope of a difference."""

from __future__ import annotations

import triton
import triton.language as tl

from mimkernels.ops._triton import pixel_offset, valid_id, widen

MSE, L1 = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def load_target(
    patch_ptr,
    scale_ptr,
    shift_ptr,
    stride_c,
    stride_t,
    stride_h,
    e,
    CHANNELS: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    # Pixels e of the patch that starts at patch_ptr, times scale plus shift, in fp32; zeros beyond the patch.
    offset, channel = pixel_offset(e, stride_c, stride_t, stride_h, CHANNELS, PT, PH, PW, CHANNELS_LAST)
    inside = e < CHANNELS * PT * PH * PW
    value = widen(tl.load(patch_ptr + offset, mask=inside, other=0.0))
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channel, mask=inside, other=0.0)
        value = value * scale + tl.load(shift_ptr + channel, mask=inside, other=0.0)
    return value


@triton.jit
def inverse_deviation(sum_squares, PIXELS: tl.constexpr):
    # 1 / sqrt(unbiased variance + 1e-6); a single pixel has no unbiased variance: NaN, as in torch.
    if PIXELS == 1:
        return sum_squares * float("nan")
    else:
        return tl.math.div_rn(1.0 + sum_squares * 0.0, tl.sqrt_rn(sum_squares / (PIXELS - 1) + 1e-6))


@triton.jit
def block_statistics(value, e, PIXELS: tl.constexpr):
    # (mean, 1 / deviation) of a patch that one block holds.
    mean = tl.sum(value, axis=0) / PIXELS
    deviation = tl.where(e < PIXELS, value - mean, 0.0)
    return mean, inverse_deviation(tl.sum(deviation * deviation, axis=0), PIXELS)


@triton.jit
def chunked_statistics(
    patch_ptr,
    scale_ptr,
    shift_ptr,
    stride_c,
    stride_t,
    stride_h,
    CHANNELS: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # (mean, 1 / deviation) of a larger patch, in two passes over its pixels.
    PIXELS: tl.constexpr = CHANNELS * PT * PH * PW
    acc = tl.zeros([BLOCK_E], dtype=tl.float32)
    for first in range(0, PIXELS, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        value = load_target(
            *(patch_ptr, scale_ptr, shift_ptr, stride_c, stride_t, stride_h, e), CHANNELS, PT, PH, PW, CHANNELS_LAST
        )
        acc += tl.where(e < PIXELS, value, 0.0)
    mean = tl.sum(acc, axis=0) / PIXELS
    acc = tl.zeros([BLOCK_E], dtype=tl.float32)
    for first in range(0, PIXELS, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        value = load_target(
            *(patch_ptr, scale_ptr, shift_ptr, stride_c, stride_t, stride_h, e), CHANNELS, PT, PH, PW, CHANNELS_LAST
        )
        deviation = tl.where(e < PIXELS, value - mean, 0.0)
        acc += deviation * deviation
    return mean, inverse_deviation(tl.sum(acc, axis=0), PIXELS)


@triton.jit
def is_counted(
    ids_ptr,
    mask_ptr,
    image,
    row,
    patches,
    grid_w,
    ids_stride,
    mask_stride,
    mask_row,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
):
    # (whether this row of pred has a loss, its patch, how many of its cells count). An id outside [0, N) has none.
    if ids_ptr is not None:
        patch = valid_id(tl.load(ids_ptr + image * ids_stride + row), patches)
        return patch >= 0, patch, 1
    elif CELLS_H == 0:
        return tl.load(mask_ptr + image * mask_stride + row) != 0, row, 1
    else:
        # Of a mask [B, gh * CELLS_H, gw * CELLS_W].
        cell = tl.arange(0, BLOCK_CELLS)
        rows = row // grid_w * CELLS_H + cell // CELLS_W
        columns = row % grid_w * CELLS_W + cell % CELLS_W
        place = image * mask_stride + rows.to(tl.int64) * mask_row + columns
        flags = tl.load(mask_ptr + place, mask=cell < CELLS_H * CELLS_W, other=0)
        cells = tl.sum((flags != 0).to(tl.int32), axis=0)
        return cells > 0, row, cells


@triton.jit
def in_counted_cell(
    mask_ptr,
    image,
    row,
    y,
    x,
    inside,
    grid_w,
    mask_stride,
    mask_row,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
):
    # Whether pixels (y, x) of patch `row` lie in true cells; False where not inside.
    cell_row = row // grid_w * CELLS_H + y // (PH // CELLS_H)
    cell = cell_row.to(tl.int64) * mask_row + row % grid_w * CELLS_W + x // (PW // CELLS_W)
    return tl.load(mask_ptr + image * mask_stride + cell, mask=inside, other=0) != 0


@triton.jit
def elements_that_count(
    mask_ptr,
    image,
    row,
    e,
    grid_w,
    mask_stride,
    mask_row,
    CHANNELS: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
):
    # Whether elements e of patch `row` count: those inside it, of a mask with cells those of true cells.
    inside = e < CHANNELS * PT * PH * PW
    if CELLS_H == 0:
        return inside
    else:
        if CHANNELS_LAST:
            pixel = e // CHANNELS
        else:
            pixel = e % (PT * PH * PW)
        place = (pixel // PW % PH, pixel % PW, inside, grid_w, mask_stride, mask_row)
        return in_counted_cell(mask_ptr, image, row, *place, PH, PW, CELLS_H, CELLS_W)


@triton.jit
def share_of_patch(
    value, cells, MEAN: tl.constexpr, PIXELS: tl.constexpr, CELLS_H: tl.constexpr, CELLS_W: tl.constexpr
):
    # What is divided by the number of elements of a patch; of a mask with cells by those that count, or, where a mean
    # divides by the number of cells, by those of one.
    if CELLS_H == 0:
        return value / PIXELS
    elif MEAN:
        return value / (PIXELS // (CELLS_H * CELLS_W))
    else:
        return value / (PIXELS // (CELLS_H * CELLS_W) * cells)


@triton.jit
def element_loss(diff, beta, KIND: tl.constexpr):
    size = tl.abs(diff)
    if KIND == MSE:
        return diff * diff
    elif KIND == L1:
        return size
    else:
        return tl.where(size < beta, 0.5 * diff * diff / beta, size - 0.5 * beta)


@triton.jit
def element_slope(diff, beta, KIND: tl.constexpr):
    # A NaN difference has sign 0, as in torch.
    sign = tl.where(diff > 0, 1.0, tl.where(diff < 0, -1.0, 0.0))
    if KIND == MSE:
        return 2.0 * diff
    elif KIND == L1:
        return sign
    else:
        return tl.where(tl.abs(diff) >= beta, sign, diff / beta)


@triton.jit
def local_target(
    plane_ptr,
    scale,
    shift,
    ys,
    xs,
    first_y,
    first_x,
    stride_h,
    height,
    width,
    reach,
    SCALED: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # fp32 [BLOCK_Y, BLOCK_X]: pixels (ys, xs) of a plane, consecutive from (first_y, first_x) on, each minus the mean
    # over the deviation of the box of `reach` pixels to each side. Sums are in fp64, of columns first, and nothing is
    # subtracted from them: squares cancel, and what is not finite is felt in its boxes alone.
    sums = tl.zeros([BLOCK_Y, BLOCK_X], dtype=tl.float64)
    squares = tl.zeros([BLOCK_Y, BLOCK_X], dtype=tl.float64)
    first_row = tl.maximum(first_y - reach, 0)
    end_row = tl.minimum(first_y + BLOCK_Y + reach, height)
    for column in range(tl.maximum(first_x - reach, 0), tl.minimum(first_x + BLOCK_X + reach, width), BLOCK_W):
        columns = column + tl.arange(0, BLOCK_W)
        down = tl.zeros([BLOCK_Y, BLOCK_W], dtype=tl.float64)
        down_squares = tl.zeros([BLOCK_Y, BLOCK_W], dtype=tl.float64)
        for row in range(first_row, end_row):
            pixels = widen(
                tl.load(plane_ptr + tl.cast(row, tl.int64) * stride_h + columns, mask=columns < width, other=0.0)
            )
            if SCALED:
                pixels = tl.where(columns < width, pixels * scale + shift, 0.0)
            wide = pixels.to(tl.float64)[None, :]
            near = (tl.abs(ys - row) <= reach)[:, None]
            down += tl.where(near, wide, 0.0)
            down_squares += tl.where(near, wide * wide, 0.0)
        beside = (tl.abs(columns[None, :] - xs[:, None]) <= reach)[None, :, :]
        sums += tl.sum(tl.where(beside, down[:, None, :], 0.0), axis=2)
        squares += tl.sum(tl.where(beside, down_squares[:, None, :], 0.0), axis=2)
    rows = tl.minimum(ys + reach, height - 1) - tl.maximum(ys - reach, 0) + 1
    across = tl.minimum(xs + reach, width - 1) - tl.maximum(xs - reach, 0) + 1
    count = tl.maximum(rows[:, None] * across[None, :], 1).to(tl.float64)
    mean = sums / count
    rest = squares - sums * mean
    variance = tl.where(rest < 0.0, 0.0, rest) / tl.where(count > 1.0, count - 1.0, 1.0)  # NaN stays NaN
    inside = (ys < height)[:, None] & (xs < width)[None, :]
    own = plane_ptr + ys.to(tl.int64)[:, None] * stride_h + xs[None, :]
    pixels = widen(tl.load(own, mask=inside, other=0.0))
    if SCALED:
        pixels = pixels * scale + shift
    return ((pixels.to(tl.float64) - mean) / tl.sqrt(variance + 1e-6)).to(tl.float32)
