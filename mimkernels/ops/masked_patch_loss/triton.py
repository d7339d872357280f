"""Triton kernels of masked_patch_loss."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _checks, _triton
from mimkernels.ops._triton import narrow, patch_offset, widen
from mimkernels.ops.masked_patch_loss.reference import pixels_that_count
from mimkernels.ops.masked_patch_loss.triton_local import (
    masked_patch_loss_local_bwd_kernel,
    masked_patch_loss_local_fwd_kernel,
)
from mimkernels.ops.masked_patch_loss.triton_target import (
    block_statistics,
    chunked_statistics,
    element_loss,
    element_slope,
    elements_that_count,
    is_counted,
    load_target,
    share_of_patch,
)

# A patch of up to MAX_BLOCK pixels stays in registers; a larger one is read once per pass, CHUNK pixels at a time.
MAX_BLOCK, CHUNK = 4096, 2048
# The mean over patches: one program up to MEAN_BLOCK of them, at most MEAN_PROGRAMS and a second launch above.
MEAN_BLOCK, MEAN_PROGRAMS = 8192, 64
# Of a patch whose pixels are normalised by boxes: rows and columns at a time, and columns of sums beside them.
LOCAL_Y, LOCAL_X, LOCAL_W, LOCAL_WARPS = 4, 16, 32, 4


@triton.jit(do_not_specialize=_triton.SIZES)
def masked_patch_loss_fwd_kernel(
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
    beta,
    CHANNELS: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NORM_PIX: tl.constexpr,
    KIND: tl.constexpr,
    UNCOUNTED: tl.constexpr,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # grid:     B * L; a program owns one row of pred, whose target it builds in registers
    # in:       pred [B, L, E], images [B, C, T, H, W], ids int64 [B, L] or mask bool [B, N = L], by stride, last
    #           stride 1; scale and shift fp32 [C] or None; E padded to the block, or read in chunks
    #           With CELLS_H, mask bool [B, gh * CELLS_H, gw * CELLS_W] by stride
    # out:      loss fp32 [B, L] contiguous, UNCOUNTED where the patch has none; with cells int32 [B, L], the true ones
    #           of each patch, the loss of one of them times their number; every element written once
    # numerics: fp32; variance about the mean, unbiased, in a second pass over registers; sums by a tree
    # bounds:   the pixel tail is masked; offsets are int64
    # cost:     counted rows of pred and their pixels read once; with NORM_PIX, pixels thrice if E > BLOCK_E
    PIXELS: tl.constexpr = CHANNELS * PT * PH * PW
    pid = tl.program_id(0)
    image = (pid // rows).to(tl.int64)
    row = pid % rows
    place = (image, row, patches, grid_w, ids_stride, mask_stride, mask_row)
    counted, patch, cells = is_counted(ids_ptr, mask_ptr, *place, CELLS_H, CELLS_W, BLOCK_CELLS)
    loss = tl.full([], UNCOUNTED, tl.float32)
    if counted:
        pred_row = pred_ptr + image * pred_stride_b + row.to(tl.int64) * pred_stride_l
        patch_ptr = images_ptr + image * stride_b
        patch_ptr += patch_offset(patch, grid_h, grid_w, stride_t, stride_h, PT, PH, PW)
        pixels = (patch_ptr, scale_ptr, shift_ptr, stride_c, stride_t, stride_h)
        if NORM_PIX and PIXELS > BLOCK_E:
            mean, inverse = chunked_statistics(*pixels, CHANNELS, PT, PH, PW, CHANNELS_LAST, BLOCK_E)
        total = tl.zeros([BLOCK_E], dtype=tl.float32)
        for first in range(0, PIXELS, BLOCK_E):
            e = first + tl.arange(0, BLOCK_E)
            value = widen(tl.load(pred_row + e, mask=e < PIXELS, other=0.0))
            target = load_target(*pixels, e, CHANNELS, PT, PH, PW, CHANNELS_LAST)
            if NORM_PIX:
                if PIXELS <= BLOCK_E:
                    mean, inverse = block_statistics(target, e, PIXELS)
                target = (target - mean) * inverse
            counts = elements_that_count(
                *(mask_ptr, image, row, e, grid_w, mask_stride, mask_row),
                *(CHANNELS, PT, PH, PW, CHANNELS_LAST, CELLS_H, CELLS_W),
            )
            total += element_loss(tl.where(counts, value - target, 0.0), beta, KIND)
        loss = share_of_patch(tl.sum(total, axis=0), cells, cells_ptr is not None, PIXELS, CELLS_H, CELLS_W)
    tl.store(loss_ptr + pid, loss)
    if cells_ptr is not None:
        tl.store(cells_ptr + pid, cells)


@triton.jit(do_not_specialize=("count", *_triton.SIZES))
def masked_patch_loss_bwd_kernel(
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
    beta,
    CHANNELS: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NORM_PIX: tl.constexpr,
    KIND: tl.constexpr,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # grid:     B * L; a program owns one row of dpred
    # in:       as forward; grad fp32 by stride (0 for a scalar); the number of patches to divide by: count, or int32
    #           [] at count_ptr
    # out:      dpred [B, L, E] contiguous, zeros where the patch does not count; every element written once
    # numerics: fp32, the target recomputed as in the forward pass, rounded once
    # bounds:   the pixel tail is masked; offsets are int64
    # cost:     counted rows of pred and their pixels read once, dpred written once; no atomics, deterministic
    PIXELS: tl.constexpr = CHANNELS * PT * PH * PW
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
        pred_row = pred_ptr + image * pred_stride_b + row.to(tl.int64) * pred_stride_l
        patch_ptr = images_ptr + image * stride_b
        patch_ptr += patch_offset(patch, grid_h, grid_w, stride_t, stride_h, PT, PH, PW)
        pixels = (patch_ptr, scale_ptr, shift_ptr, stride_c, stride_t, stride_h)
        if NORM_PIX and PIXELS > BLOCK_E:
            mean, inverse = chunked_statistics(*pixels, CHANNELS, PT, PH, PW, CHANNELS_LAST, BLOCK_E)
        for first in range(0, PIXELS, BLOCK_E):
            e = first + tl.arange(0, BLOCK_E)
            value = widen(tl.load(pred_row + e, mask=e < PIXELS, other=0.0))
            target = load_target(*pixels, e, CHANNELS, PT, PH, PW, CHANNELS_LAST)
            if NORM_PIX:
                if PIXELS <= BLOCK_E:
                    mean, inverse = block_statistics(target, e, PIXELS)
                target = (target - mean) * inverse
            slope = grad * element_slope(value - target, beta, KIND)
            if CELLS_H > 0:
                counts = elements_that_count(
                    *(mask_ptr, image, row, e, grid_w, mask_stride, mask_row),
                    *(CHANNELS, PT, PH, PW, CHANNELS_LAST, CELLS_H, CELLS_W),
                )
                slope = tl.where(counts, slope, 0.0)
            tl.store(out + e, narrow(slope, dpred_ptr.dtype.element_ty), mask=e < PIXELS)
    else:
        for first in range(0, PIXELS, BLOCK_E):
            e = first + tl.arange(0, BLOCK_E)
            tl.store(out + e, tl.zeros([BLOCK_E], dtype=dpred_ptr.dtype.element_ty), mask=e < PIXELS)


@triton.jit(do_not_specialize=("length", "per_program"))
def patch_mean_kernel(
    loss_ptr,
    counts_ptr,
    out_ptr,
    out_counts_ptr,
    length,
    per_program,
    FINAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # grid:     one program per `per_program` losses; FINAL: one program
    # in:       loss fp32 [n], negative where a patch does not count (a loss never is); or, with counts int32 [n],
    #           partial sums
    # out:      FINAL: fp32 [], sum / count; else partial sums fp32 and counts int32, one each per program
    # numerics: fp32; losses are added BLOCK apart, then by a tree: the order depends on n alone; 0 / 0 is NaN
    # bounds:   the tail is masked; offsets are int64
    # cost:     loss read once; no atomics, deterministic
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * per_program
    total = tl.zeros([BLOCK], dtype=tl.float32)
    count = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, per_program, BLOCK):
        i = start + first + tl.arange(0, BLOCK)
        inside = i < tl.minimum(start + per_program, length)
        if counts_ptr is not None:
            total += tl.load(loss_ptr + i, mask=inside, other=0.0)
            count += tl.load(counts_ptr + i, mask=inside, other=0)
        else:
            loss = tl.load(loss_ptr + i, mask=inside, other=-1.0)
            total += tl.where(loss < 0.0, 0.0, loss)
            count += tl.where(loss < 0.0, 0, 1)
    total_sum = tl.sum(total, axis=0)
    total_count = tl.sum(count, axis=0)
    if FINAL:
        tl.store(out_ptr, tl.math.div_rn(total_sum, total_count.to(tl.float32)))
    else:
        tl.store(out_ptr + pid, total_sum)
        tl.store(out_counts_ptr + pid, total_count)


@triton.jit(do_not_specialize=_triton.SIZES)
def count_kernel(mask_ptr, out_ptr, images, rows, mask_stride, BLOCK: tl.constexpr):
    # grid:     1
    # in:       mask bool [B, N] by stride, last stride 1
    # out:      int32 [], the number of True
    # numerics: integers
    # bounds:   the tail is masked; offsets are int64
    # cost:     mask read once
    count = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, images * rows, BLOCK):
        i = first + tl.arange(0, BLOCK)
        source = mask_ptr + (i // rows).to(tl.int64) * mask_stride + i % rows
        count += (tl.load(source, mask=i < images * rows, other=0) != 0).to(tl.int32)
    tl.store(out_ptr, tl.sum(count, axis=0))


def masked_patch_loss_fwd(
    pred: Tensor,
    images: Tensor,
    ids: Tensor | None,
    mask: Tensor | None,
    patch_t: int,
    patch_h: int,
    patch_w: int,
    scale: Tensor | None,
    shift: Tensor | None,
    norm_pix: bool,
    kind: int,
    beta: float,
    channels_last: bool,
    mean: bool,
    local_norm: int,
) -> Tensor:
    images = _checks.as_video(images)
    batch, rows, pixels = pred.shape
    grid_h, grid_w, patches = _grid(images, ids, patch_t, patch_h, patch_w)
    cell_sizes, mask_row = _cells(mask, grid_h, grid_w)
    loss = pred.new_empty((batch, rows), dtype=torch.float32)  # [B, L]
    if pred.numel() == 0:
        # No patches, or patches without pixels, whose mean is NaN.
        loss.fill_(float("nan"))
        if mean:
            return loss.new_full((), float("nan"))
        if mask is not None and mask.dim() == 3:
            mask = pixels_that_count(mask, images, (patch_t, patch_h, patch_w)).flatten(2).any(2)
        return loss if mask is None else loss.masked_fill_(~mask, 0.0)
    cells = None if not cell_sizes[0] else torch.empty_like(loss, dtype=torch.int32)  # the true ones of each patch
    target, tiles, warps = _target(images, patch_h, patch_w, pixels, norm_pix, local_norm)
    _triton.launch(
        masked_patch_loss_local_fwd_kernel if local_norm else masked_patch_loss_fwd_kernel,
        batch * rows,
        pred,
        *(pred, images, ids, mask, scale, shift, loss, cells if mean else None),
        *(rows, patches, grid_h, grid_w, pred.stride(0), pred.stride(1)),
        *(*images.stride()[:4], _stride(ids), _stride(mask), mask_row, *target, beta),
        CHANNELS=images.shape[1],
        PT=patch_t,
        PH=patch_h,
        PW=patch_w,
        CHANNELS_LAST=channels_last,
        KIND=kind,
        UNCOUNTED=-1.0 if mean and mask is not None and cells is None else 0.0,
        **_cell_blocks(cell_sizes),
        **tiles,
        num_warps=warps,
    )
    return _mean(loss, cells) if mean else loss


def masked_patch_loss_bwd(
    grad: Tensor,
    pred: Tensor,
    images: Tensor,
    ids: Tensor | None,
    mask: Tensor | None,
    patch_t: int,
    patch_h: int,
    patch_w: int,
    scale: Tensor | None,
    shift: Tensor | None,
    norm_pix: bool,
    kind: int,
    beta: float,
    channels_last: bool,
    mean: bool,
    local_norm: int,
) -> Tensor:
    images = _checks.as_video(images)
    batch, rows, pixels = pred.shape
    grid_h, grid_w, patches = _grid(images, ids, patch_t, patch_h, patch_w)
    cell_sizes, mask_row = _cells(mask, grid_h, grid_w)
    dpred = pred.new_empty(pred.shape)  # [B, L, E]
    if dpred.numel() == 0:
        return dpred
    count = None
    if mean and mask is not None and mask.dim() == 3:  # many more than patches
        count = mask.sum(dtype=torch.int32)
    elif mean and mask is not None:
        count = torch.empty((), dtype=torch.int32, device=pred.device)
        _triton.launch(count_kernel, 1, mask, mask, count, batch, rows, mask.stride(0), BLOCK=MEAN_BLOCK, num_warps=8)
    target, tiles, warps = _target(images, patch_h, patch_w, pixels, norm_pix, local_norm)
    _triton.launch(
        masked_patch_loss_local_bwd_kernel if local_norm else masked_patch_loss_bwd_kernel,
        batch * rows,
        pred,
        *(grad, count, pred, images, ids, mask, scale, shift, dpred),
        *(batch * rows if mean else 1, rows, patches, grid_h, grid_w),
        *((0, 0) if mean else grad.stride()),
        *(pred.stride(0), pred.stride(1), *images.stride()[:4], _stride(ids), _stride(mask), mask_row, *target, beta),
        CHANNELS=images.shape[1],
        PT=patch_t,
        PH=patch_h,
        PW=patch_w,
        CHANNELS_LAST=channels_last,
        KIND=kind,
        **_cell_blocks(cell_sizes),
        **tiles,
        num_warps=warps,
    )
    return dpred


def _grid(images: Tensor, ids: Tensor | None, patch_t: int, patch_h: int, patch_w: int) -> tuple[int, int, int]:
    frames, height, width = images.shape[2:]
    grid_h, grid_w = height // patch_h, width // patch_w
    patches = frames // patch_t * grid_h * grid_w
    if ids is not None:
        _triton.check_ids("masked_patch_loss", "ids", ids, patches)
    return grid_h, grid_w, patches


def _cells(mask: Tensor | None, grid_h: int, grid_w: int) -> tuple[tuple[int, int], int]:
    """Rows and columns of a finer mask's cells in a patch, (0, 0) of another, and how far its rows are apart."""
    if mask is None or mask.dim() == 2:
        return (0, 0), 0
    return (mask.shape[1] // max(grid_h, 1), mask.shape[2] // max(grid_w, 1)), mask.stride(1)


def _cell_blocks(cells: tuple[int, int]) -> dict[str, int]:
    return {
        "CELLS_H": cells[0],
        "CELLS_W": cells[1],
        "BLOCK_CELLS": triton.next_power_of_2(max(1, cells[0] * cells[1])),
    }


def _target(
    images: Tensor, patch_h: int, patch_w: int, pixels: int, norm_pix: bool, local_norm: int
) -> tuple[tuple[int, ...], dict[str, object], int]:
    """(Arguments, constants, warps) of a kernel that follow from how targets are normalised."""
    if local_norm:
        reach = min(local_norm // 2, max(images.shape[3:]))
        block_y, block_x = (
            min(most, triton.next_power_of_2(side)) for most, side in ((LOCAL_Y, patch_h), (LOCAL_X, patch_w))
        )
        blocks = {"BLOCK_Y": block_y, "BLOCK_X": block_x, "BLOCK_W": LOCAL_W}
        return (reach,), {**blocks, "maxnreg": _triton.SUM_REGISTERS}, LOCAL_WARPS
    block = max(32, triton.next_power_of_2(pixels)) if pixels <= MAX_BLOCK else CHUNK
    return (), {"NORM_PIX": norm_pix, "BLOCK_E": block}, min(8, max(1, block // 256))


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _mean(loss: Tensor, counts: Tensor | None) -> Tensor:
    """Mean of the losses that are not negative; or their sum over that of `counts`, those of each."""
    length = loss.numel()
    out = loss.new_empty(())
    if length > MEAN_BLOCK:
        blocks = triton.cdiv(triton.cdiv(length, MEAN_PROGRAMS), 1024)
        programs = triton.cdiv(length, blocks * 1024)
        partial = loss.new_empty(programs)
        partial_counts = torch.empty(programs, dtype=torch.int32, device=loss.device)
        args: tuple[object, ...] = (loss, counts, partial, partial_counts, length, blocks * 1024)
        _triton.launch(patch_mean_kernel, programs, loss, *args, FINAL=False, BLOCK=1024)
        loss, counts, length = partial, partial_counts, programs
    block = max(128, triton.next_power_of_2(length))
    args = (loss, counts, out, None, length, length)
    warps = min(8, block // 128)
    _triton.launch(patch_mean_kernel, 1, loss, *args, FINAL=True, BLOCK=block, num_warps=warps)
    return out
