"""Triton kernels of masked_patch_loss whose targets are normalised by a box around each pixel."""

from __future__ import annotations

import triton
import triton.language as tl

from mimkernels.ops import _triton
from mimkernels.ops._triton import narrow, widen
from mimkernels.ops.masked_patch_loss.triton_target import (
    element_loss,
    element_slope,
    in_counted_cell,
    is_counted,
    local_target,
    share_of_patch,
)


@triton.jit
def plane_of(image_ptr, scale_ptr, shift_ptr, plane, frame, stride_c, stride_t, PT: tl.constexpr):
    # (where plane (c, t) of an image's patch starts, scale, shift of its channel).
    c, t = plane // PT, plane % PT
    plane_ptr = image_ptr + tl.cast(c, tl.int64) * stride_c
    plane_ptr += tl.cast(frame + t, tl.int64) * stride_t
    scale, shift = 1.0, 0.0
    if scale_ptr is not None:
        scale, shift = tl.load(scale_ptr + c), tl.load(shift_ptr + c)
    return plane_ptr, scale, shift


@triton.jit
def tile_difference(
    pred_row,
    plane_ptr,
    scale,
    shift,
    mask_ptr,
    image,
    row,
    plane,
    tile,
    first_y,
    first_x,
    stride_h,
    grid_h,
    grid_w,
    mask_stride,
    mask_row,
    reach,
    SCALED: tl.constexpr,
    CHANNELS: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # [BLOCK_Y, BLOCK_X] each, of one tile of a plane of a patch: (pred minus target, elements of the row of pred,
    # whether they lie inside it, whether they count).
    TILES_X: tl.constexpr = (PW + BLOCK_X - 1) // BLOCK_X
    y = tile // TILES_X * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = tile % TILES_X * BLOCK_X + tl.arange(0, BLOCK_X)
    target = local_target(
        *(plane_ptr, scale, shift, first_y + y, first_x + x),
        *(first_y + tile // TILES_X * BLOCK_Y, first_x + tile % TILES_X * BLOCK_X),
        *(stride_h, grid_h * PH, grid_w * PW, reach, SCALED, BLOCK_Y, BLOCK_X, BLOCK_W),
    )
    inside = (y < PH)[:, None] & (x < PW)[None, :]
    if CHANNELS_LAST:
        e = ((plane % PT * PH + y[:, None]) * PW + x[None, :]) * CHANNELS + plane // PT
    else:
        e = (plane * PH + y[:, None]) * PW + x[None, :]
    value = widen(tl.load(pred_row + e, mask=inside, other=0.0))
    counts = inside
    if CELLS_H > 0:
        counts = in_counted_cell(
            *(mask_ptr, image, row, y[:, None], x[None, :], inside, grid_w, mask_stride, mask_row),
            *(PH, PW, CELLS_H, CELLS_W),
        )
    return value - target, e, inside, counts


@triton.jit(do_not_specialize=_triton.SIZES)
def masked_patch_loss_local_fwd_kernel(
    pred_ptr,
    images_ptr,
    ids_ptr,
    mask_ptr,
    scale_ptr,
    shift_ptr,
    loss_ptr,
    cells_ptr,
    rows,
    patches,
    grid_h,
    grid_w,
    pred_stride_b,
    pred_stride_l,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    ids_stride,
    mask_stride,
    mask_row,
    reach,
    beta,
    CHANNELS: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    KIND: tl.constexpr,
    UNCOUNTED: tl.constexpr,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # grid:     B * L; a program owns one row of pred, whose target it builds tile by tile
    # in:       as masked_patch_loss_fwd_kernel; targets are relative to the box of `reach` pixels around each
    # out:      as masked_patch_loss_fwd_kernel
    # numerics: sums over boxes in fp64, of columns and then of these; else fp32; sums by a tree
    # bounds:   the tails of tiles are masked; offsets are int64
    # cost:     counted rows of pred read once; of each tile its pixels and those of its boxes
    PIXELS: tl.constexpr = CHANNELS * PT * PH * PW
    TILES_Y: tl.constexpr = (PH + BLOCK_Y - 1) // BLOCK_Y
    TILES_X: tl.constexpr = (PW + BLOCK_X - 1) // BLOCK_X
    pid = tl.program_id(0)
    image = (pid // rows).to(tl.int64)
    row = pid % rows
    place = (image, row, patches, grid_w, ids_stride, mask_stride, mask_row)
    counted, patch, cells = is_counted(ids_ptr, mask_ptr, *place, CELLS_H, CELLS_W, BLOCK_CELLS)
    loss = tl.full([], UNCOUNTED, tl.float32)
    if counted:
        total = tl.zeros([BLOCK_Y, BLOCK_X], dtype=tl.float32)
        first_y, first_x = patch // grid_w % grid_h * PH, patch % grid_w * PW
        frame = patch // grid_w // grid_h * PT
        pred_row = pred_ptr + image * pred_stride_b + row.to(tl.int64) * pred_stride_l
        for plane in range(CHANNELS * PT):
            plane_ptr, scale, shift = plane_of(
                images_ptr + image * stride_b, scale_ptr, shift_ptr, plane, frame, stride_c, stride_t, PT
            )
            for tile in range(TILES_Y * TILES_X):
                difference, _, _, counts = tile_difference(
                    *(pred_row, plane_ptr, scale, shift, mask_ptr, image, row, plane, tile, first_y, first_x, stride_h),
                    *(
                        grid_h,
                        grid_w,
                        mask_stride,
                        mask_row,
                        reach,
                        scale_ptr is not None,
                        CHANNELS,
                        PT,
                        PH,
                        PW,
                        CHANNELS_LAST,
                    ),
                    *(CELLS_H, CELLS_W, BLOCK_Y, BLOCK_X, BLOCK_W),
                )
                total += element_loss(tl.where(counts, difference, 0.0), beta, KIND)
        loss = tl.sum(tl.sum(total, axis=1), axis=0)
        loss = share_of_patch(loss, cells, cells_ptr is not None, PIXELS, CELLS_H, CELLS_W)
    tl.store(loss_ptr + pid, loss)
    if cells_ptr is not None:
        tl.store(cells_ptr + pid, cells)


@triton.jit(do_not_specialize=("count", *_triton.SIZES))
def masked_patch_loss_local_bwd_kernel(
    grad_ptr,
    count_ptr,
    pred_ptr,
    images_ptr,
    ids_ptr,
    mask_ptr,
    scale_ptr,
    shift_ptr,
    dpred_ptr,
    count,
    rows,
    patches,
    grid_h,
    grid_w,
    grad_stride_b,
    grad_stride_l,
    pred_stride_b,
    pred_stride_l,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    ids_stride,
    mask_stride,
    mask_row,
    reach,
    beta,
    CHANNELS: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    KIND: tl.constexpr,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # grid:     B * L; a program owns one row of dpred
    # in:       as masked_patch_loss_bwd_kernel and masked_patch_loss_local_fwd_kernel
    # out:      dpred [B, L, E] contiguous, zeros where the patch does not count; every element written once
    # numerics: fp32, the target recomputed as in the forward pass, rounded once
    # bounds:   the tails of tiles are masked; offsets are int64
    # cost:     as masked_patch_loss_local_fwd_kernel; dpred written once; no atomics, deterministic
    PIXELS: tl.constexpr = CHANNELS * PT * PH * PW
    TILES_Y: tl.constexpr = (PH + BLOCK_Y - 1) // BLOCK_Y
    TILES_X: tl.constexpr = (PW + BLOCK_X - 1) // BLOCK_X
    pid = tl.program_id(0)
    image = (pid // rows).to(tl.int64)
    row = pid % rows
    place = (image, row, patches, grid_w, ids_stride, mask_stride, mask_row)
    counted, patch, cells = is_counted(ids_ptr, mask_ptr, *place, CELLS_H, CELLS_W, BLOCK_CELLS)
    out = dpred_ptr + pid.to(tl.int64) * PIXELS
    if counted:
        divisor = count.to(tl.float32)
        if count_ptr is not None:
            divisor = tl.load(count_ptr).to(tl.float32)
        grad = tl.load(grad_ptr + image * grad_stride_b + row.to(tl.int64) * grad_stride_l)
        grad = share_of_patch(tl.math.div_rn(grad, divisor), cells, count_ptr is not None, PIXELS, CELLS_H, CELLS_W)
        first_y, first_x = patch // grid_w % grid_h * PH, patch % grid_w * PW
        frame = patch // grid_w // grid_h * PT
        pred_row = pred_ptr + image * pred_stride_b + row.to(tl.int64) * pred_stride_l
        for plane in range(CHANNELS * PT):
            plane_ptr, scale, shift = plane_of(
                images_ptr + image * stride_b, scale_ptr, shift_ptr, plane, frame, stride_c, stride_t, PT
            )
            for tile in range(TILES_Y * TILES_X):
                difference, e, inside, counts = tile_difference(
                    *(pred_row, plane_ptr, scale, shift, mask_ptr, image, row, plane, tile, first_y, first_x, stride_h),
                    *(
                        grid_h,
                        grid_w,
                        mask_stride,
                        mask_row,
                        reach,
                        scale_ptr is not None,
                        CHANNELS,
                        PT,
                        PH,
                        PW,
                        CHANNELS_LAST,
                    ),
                    *(CELLS_H, CELLS_W, BLOCK_Y, BLOCK_X, BLOCK_W),
                )
                slope = tl.where(counts, grad * element_slope(difference, beta, KIND), 0.0)
                tl.store(out + e, narrow(slope, dpred_ptr.dtype.element_ty), mask=inside)
    else:
        zeros = tl.zeros([BLOCK_Y * BLOCK_X], dtype=dpred_ptr.dtype.element_ty)
        for first in range(0, PIXELS, BLOCK_Y * BLOCK_X):
            e = first + tl.arange(0, BLOCK_Y * BLOCK_X)
            tl.store(out + e, zeros, mask=e < PIXELS)
