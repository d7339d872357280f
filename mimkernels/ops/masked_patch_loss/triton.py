"""Triton kernels of masked_patch_loss."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _checks, _triton
from mimkernels.ops._triton import narrow, patch_offset, pixel_offset, valid_id, widen

# A patch of up to MAX_BLOCK pixels stays in registers; a larger one is read once per pass, CHUNK pixels at a time.
MAX_BLOCK, CHUNK = 4096, 2048
# The mean over patches: one program up to MEAN_BLOCK of them, at most MEAN_PROGRAMS and a second launch above.
MEAN_BLOCK, MEAN_PROGRAMS = 8192, 64

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
def is_counted(ids_ptr, mask_ptr, image, row, patches, ids_stride, mask_stride):
    # (whether this row of pred has a loss, its patch). An id outside [0, N) has none.
    if ids_ptr is not None:
        patch = valid_id(tl.load(ids_ptr + image * ids_stride + row), patches)
        return patch >= 0, patch
    else:
        return tl.load(mask_ptr + image * mask_stride + row) != 0, row


@triton.jit
def masked_patch_loss_fwd_kernel(
    pred_ptr,
    images_ptr,
    ids_ptr,
    mask_ptr,
    scale_ptr,
    shift_ptr,
    loss_ptr,
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
    beta,
    CHANNELS: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NORM_PIX: tl.constexpr,
    KIND: tl.constexpr,
    UNCOUNTED: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # grid:     B * L; a program owns one row of pred, whose target it builds in registers
    # in:       pred [B, L, E], images [B, C, T, H, W], ids int64 [B, L] or mask bool [B, N = L], by stride, last
    #           stride 1; scale and shift fp32 [C] or None; E padded to the block, or read in chunks
    # out:      loss fp32 [B, L] contiguous, UNCOUNTED where the patch has none; every element written once
    # numerics: fp32; variance about the mean, unbiased, in a second pass over registers; sums by a tree
    # bounds:   the pixel tail is masked; offsets are int64
    # cost:     counted rows of pred and their pixels read once; with NORM_PIX, pixels thrice if E > BLOCK_E
    PIXELS: tl.constexpr = CHANNELS * PT * PH * PW
    pid = tl.program_id(0)
    image = (pid // rows).to(tl.int64)
    row = pid % rows
    counted, patch = is_counted(ids_ptr, mask_ptr, image, row, patches, ids_stride, mask_stride)
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
            diff = tl.where(e < PIXELS, value - target, 0.0)
            size = tl.abs(diff)
            if KIND == MSE:
                total += diff * diff
            elif KIND == L1:
                total += size
            else:
                total += tl.where(size < beta, 0.5 * diff * diff / beta, size - 0.5 * beta)
        loss = tl.sum(total, axis=0) / PIXELS
    tl.store(loss_ptr + pid, loss)


@triton.jit(do_not_specialize=["count"])
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
    beta,
    CHANNELS: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NORM_PIX: tl.constexpr,
    KIND: tl.constexpr,
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
    counted, patch = is_counted(ids_ptr, mask_ptr, image, row, patches, ids_stride, mask_stride)
    out = dpred_ptr + pid.to(tl.int64) * PIXELS
    if counted:
        divisor = count.to(tl.float32)
        if count_ptr is not None:
            divisor = tl.load(count_ptr).to(tl.float32)
        grad = tl.load(grad_ptr + image * grad_stride_b + row.to(tl.int64) * grad_stride_l)
        grad = tl.math.div_rn(grad, divisor) / PIXELS
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
            diff = value - target
            # A NaN difference has sign 0, as in torch.
            sign = tl.where(diff > 0, 1.0, tl.where(diff < 0, -1.0, 0.0))
            if KIND == MSE:
                slope = 2.0 * diff
            elif KIND == L1:
                slope = sign
            else:
                slope = tl.where(tl.abs(diff) >= beta, sign, diff / beta)
            tl.store(out + e, narrow(grad * slope, dpred_ptr.dtype.element_ty), mask=e < PIXELS)
    else:
        for first in range(0, PIXELS, BLOCK_E):
            e = first + tl.arange(0, BLOCK_E)
            tl.store(out + e, tl.zeros([BLOCK_E], dtype=dpred_ptr.dtype.element_ty), mask=e < PIXELS)


@triton.jit
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


@triton.jit
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
) -> Tensor:
    images = _checks.as_video(images)
    batch, rows, pixels = pred.shape
    grid_h, grid_w, patches = _grid(images, ids, patch_t, patch_h, patch_w)
    loss = pred.new_empty((batch, rows), dtype=torch.float32)  # [B, L]
    if pred.numel() == 0:
        # No patches, or patches without pixels, whose mean is NaN.
        loss.fill_(float("nan"))
        return loss.new_full((), float("nan")) if mean else loss if mask is None else loss.masked_fill_(~mask, 0.0)
    block_e, warps = _block(pixels)
    _triton.launch(
        masked_patch_loss_fwd_kernel,
        batch * rows,
        pred,
        *(pred, images, ids, mask, scale, shift, loss),
        *(rows, patches, grid_h, grid_w, pred.stride(0), pred.stride(1)),
        *(*images.stride()[:4], _stride(ids), _stride(mask), beta),
        CHANNELS=images.shape[1],
        PT=patch_t,
        PH=patch_h,
        PW=patch_w,
        CHANNELS_LAST=channels_last,
        NORM_PIX=norm_pix,
        KIND=kind,
        UNCOUNTED=-1.0 if mean and mask is not None else 0.0,
        BLOCK_E=block_e,
        num_warps=warps,
    )
    return _mean(loss) if mean else loss


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
) -> Tensor:
    images = _checks.as_video(images)
    batch, rows, pixels = pred.shape
    grid_h, grid_w, patches = _grid(images, ids, patch_t, patch_h, patch_w)
    dpred = pred.new_empty(pred.shape)  # [B, L, E]
    if dpred.numel() == 0:
        return dpred
    count = None
    if mean and mask is not None:
        count = torch.empty((), dtype=torch.int32, device=pred.device)
        _triton.launch(count_kernel, 1, mask, mask, count, batch, rows, mask.stride(0), BLOCK=MEAN_BLOCK, num_warps=8)
    block_e, warps = _block(pixels)
    _triton.launch(
        masked_patch_loss_bwd_kernel,
        batch * rows,
        pred,
        *(grad, count, pred, images, ids, mask, scale, shift, dpred),
        *(batch * rows if mean else 1, rows, patches, grid_h, grid_w),
        *((0, 0) if mean else grad.stride()),
        *(pred.stride(0), pred.stride(1), *images.stride()[:4], _stride(ids), _stride(mask), beta),
        CHANNELS=images.shape[1],
        PT=patch_t,
        PH=patch_h,
        PW=patch_w,
        CHANNELS_LAST=channels_last,
        NORM_PIX=norm_pix,
        KIND=kind,
        BLOCK_E=block_e,
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


def _block(pixels: int) -> tuple[int, int]:
    block = max(32, triton.next_power_of_2(pixels)) if pixels <= MAX_BLOCK else CHUNK
    return block, min(8, max(1, block // 256))


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _mean(loss: Tensor) -> Tensor:
    """Mean of the losses that are not negative."""
    length = loss.numel()
    out = loss.new_empty(())
    counts = None
    if length > MEAN_BLOCK:
        blocks = triton.cdiv(triton.cdiv(length, MEAN_PROGRAMS), 1024)
        programs = triton.cdiv(length, blocks * 1024)
        partial = loss.new_empty(programs)
        counts = torch.empty(programs, dtype=torch.int32, device=loss.device)
        args: tuple[object, ...] = (loss, None, partial, counts, length, blocks * 1024)
        _triton.launch(patch_mean_kernel, programs, loss, *args, FINAL=False, BLOCK=1024)
        loss, length = partial, programs
    block = max(128, triton.next_power_of_2(length))
    args = (loss, counts, out, None, length, length)
    warps = min(8, block // 128)
    _triton.launch(patch_mean_kernel, 1, loss, *args, FINAL=True, BLOCK=block, num_warps=warps)
    return out
