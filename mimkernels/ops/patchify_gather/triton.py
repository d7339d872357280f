"""Triton kernels of patchify_gather."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _checks, _triton
from mimkernels.ops._triton import gathered_sum, narrow, patch_offset, pixel_offset, rest, valid_id, widen


@triton.jit(do_not_specialize=_triton.SIZES)
def patchify_gather_fwd_kernel(
    images_ptr,
    ids_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    images,
    patches,
    kept,
    columns,
    row_blocks,
    chunks,
    grid_h,
    grid_w,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    ids_stride_m,
    ids_stride_b,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # grid:     M * B * row_blocks * chunks; a program owns BLOCK_R patches of one sample, BLOCK_E pixels of each
    # in:       images [B, C, T, H, W] by stride, last stride 1; ids int64 [M, B, K], or None for all patches in order;
    #           scale and shift fp32 [C], or None
    # out:      out [M * B, K, E] contiguous, pixels in order (c, t, h, w); every element written once
    # numerics: pixel * scale + shift in fp32, rounded once
    # bounds:   patch and pixel tails are masked; a patch outside [0, N) reads as zeros; offsets are int64
    # cost:     kept patches read once, output written once
    pid = tl.program_id(0)
    e = pid % chunks * BLOCK_E + tl.arange(0, BLOCK_E)
    rows = pid // chunks % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    sample = pid // chunks // row_blocks
    m = (sample // images).to(tl.int64)
    b = (sample % images).to(tl.int64)
    e_ok = e < columns
    rows_ok = rows < kept
    patch = rows
    if ids_ptr is not None:
        ids = tl.load(ids_ptr + m * ids_stride_m + b * ids_stride_b + rows, mask=rows_ok, other=-2)
        patch = valid_id(ids, patches)
    start = b * stride_b + patch_offset(patch, grid_h, grid_w, stride_t, stride_h, PT, PH, PW)
    offset, channel = pixel_offset(e, stride_c, stride_t, stride_h, 1, PT, PH, PW, False)
    found = (rows_ok & (patch >= 0))[:, None] & e_ok[None, :]
    value = widen(tl.load(images_ptr + start[:, None] + offset[None, :], mask=found, other=0.0))
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channel, mask=e_ok, other=0.0)
        shift = tl.load(shift_ptr + channel, mask=e_ok, other=0.0)
        value = tl.where(found, value * scale[None, :] + shift[None, :], 0.0)
    out = out_ptr + (sample.to(tl.int64) * kept + rows)[:, None] * columns + e[None, :]
    tl.store(out, narrow(value, out_ptr.dtype.element_ty), mask=rows_ok[:, None] & e_ok[None, :])


@triton.jit(do_not_specialize=_triton.SIZES)
def patchify_gather_bwd_kernel(
    grad_ptr,
    ids_ptr,
    scale_ptr,
    dimages_ptr,
    masks,
    patches,
    kept,
    columns,
    row_blocks,
    chunks,
    grid_h,
    grid_w,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    ids_stride_m,
    ids_stride_b,
    grad_stride_m,
    grad_stride_b,
    grad_stride_r,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # grid:     B * row_blocks * chunks; a program owns BLOCK_R patches of one image, BLOCK_E pixels of each
    # in:       grad [M * B, K, E] by stride, last stride 1; ids int64 [M, B, K] or None; scale fp32 [C] or None
    # out:      dimages [B, C, T, H, W] contiguous; every pixel lies in one patch and is written once, zero where no
    #           mask kept its patch
    # numerics: fp32 sums, m then k ascending, of fp32 rows compensated, times scale, rounded once
    # bounds:   patch and pixel tails are masked; ids outside [0, N) match nothing; offsets are int64
    # cost:     grad read once, dimages written once; ids read row_blocks * chunks times; no atomics, deterministic
    pid = tl.program_id(0)
    e = pid % chunks * BLOCK_E + tl.arange(0, BLOCK_E)
    rows = pid // chunks % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    image = (pid // chunks // row_blocks).to(tl.int64)
    e_ok = e < columns
    rows_ok = rows < patches
    ok = rows_ok[:, None] & e_ok[None, :]
    if ids_ptr is None:
        source = grad_ptr + image * grad_stride_b + rows.to(tl.int64)[:, None] * grad_stride_r + e[None, :]
        value = widen(tl.load(source, mask=ok, other=0.0))
    else:
        value, lost = gathered_sum(
            ids_ptr,
            grad_ptr,
            rows,
            rows_ok,
            e,
            e_ok,
            image,
            masks,
            patches,
            kept,
            0,
            ids_stride_m,
            ids_stride_b,
            grad_stride_m,
            grad_stride_b,
            grad_stride_r,
            BLOCK_R,
            BLOCK_E,
            BLOCK_K,
        )
        value += rest(lost)
    start = image * stride_b + patch_offset(rows, grid_h, grid_w, stride_t, stride_h, PT, PH, PW)
    offset, channel = pixel_offset(e, stride_c, stride_t, stride_h, 1, PT, PH, PW, False)
    if scale_ptr is not None:
        value *= tl.load(scale_ptr + channel, mask=e_ok, other=0.0)[None, :]
    dimages = dimages_ptr + start[:, None] + offset[None, :]
    tl.store(dimages, narrow(value, dimages_ptr.dtype.element_ty), mask=ok)


def patchify_gather_fwd(
    images: Tensor,
    ids: Tensor | None,
    patch_t: int,
    patch_h: int,
    patch_w: int,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    images = _checks.as_video(images)
    batch, channels, frames, height, width = images.shape
    grid_h, grid_w = height // patch_h, width // patch_w
    patches = frames // patch_t * grid_h * grid_w
    masks, kept = 1, patches
    if ids is not None:
        ids = _checks.as_masks(ids)
        masks, _, kept = ids.shape
        _triton.check_ids("patchify_gather", "ids", ids, patches)
    columns = channels * patch_t * patch_h * patch_w
    out = images.new_empty((masks * batch, kept, columns), dtype=dtype)  # [M * B, K, E]
    if out.numel() == 0:
        return out
    block_r, block_e, warps = _triton.tile(*out.shape, itemsize=out.element_size(), run=patch_w)
    row_blocks, chunks = triton.cdiv(kept, block_r), triton.cdiv(columns, block_e)
    _triton.launch(
        patchify_gather_fwd_kernel,
        out.shape[0] * row_blocks * chunks,
        images,
        *(images, ids, scale, shift, out),
        *(batch, patches, kept, columns, row_blocks, chunks, grid_h, grid_w),
        *images.stride()[:4],
        *((0, 0) if ids is None else ids.stride()[:2]),
        PT=patch_t,
        PH=patch_h,
        PW=patch_w,
        BLOCK_R=block_r,
        BLOCK_E=block_e,
        num_warps=warps,
    )
    return out


def patchify_gather_bwd(
    grad: Tensor,
    ids: Tensor | None,
    batch: int,
    channels: int,
    frames: int,
    height: int,
    width: int,
    patch_t: int,
    patch_h: int,
    patch_w: int,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    grid_h, grid_w = height // patch_h, width // patch_w
    patches = frames // patch_t * grid_h * grid_w
    masks, kept = 1, patches
    if ids is not None:
        ids = _checks.as_masks(ids)
        masks, _, kept = ids.shape
        _triton.check_ids("patchify_gather", "ids", ids, patches)
    dimages = grad.new_empty((batch, channels, frames, height, width), dtype=dtype)
    if dimages.numel() == 0:
        return dimages
    if grad.numel() == 0:
        return dimages.zero_()
    columns = grad.shape[2]
    block_r, block_e, warps = _triton.tile(batch, patches, columns, itemsize=dimages.element_size(), run=patch_w)
    row_blocks, chunks = triton.cdiv(patches, block_r), triton.cdiv(columns, block_e)
    _triton.launch(
        patchify_gather_bwd_kernel,
        batch * row_blocks * chunks,
        grad,
        *(grad, ids, scale, dimages),
        *(masks, patches, kept, columns, row_blocks, chunks, grid_h, grid_w),
        *dimages.stride()[:4],
        *((0, 0) if ids is None else ids.stride()[:2]),
        *(batch * grad.stride(0), grad.stride(0), grad.stride(1)),
        PT=patch_t,
        PH=patch_h,
        PW=patch_w,
        BLOCK_R=block_r,
        BLOCK_E=block_e,
        BLOCK_K=_triton.match_block(kept, block_r),
        num_warps=warps,
        maxnreg=_triton.SUM_REGISTERS,
    )
    return dimages
