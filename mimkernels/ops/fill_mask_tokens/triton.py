"""Triton kernels of fill_mask_tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _triton
from mimkernels.ops._triton import add_rows, add_term, store_sum, widen


@triton.jit(do_not_specialize=_triton.SIZES)
def fill_mask_tokens_fwd_kernel(
    x_ptr,
    mask_ptr,
    token_ptr,
    out_ptr,
    tokens,
    columns,
    row_blocks,
    chunks,
    x_stride_b,
    x_stride_n,
    mask_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # grid:     B * row_blocks * chunks; a program owns BLOCK_R tokens of one image, BLOCK_D columns wide
    # in:       x [B, N, D] and mask bool [B, N], by stride, last stride 1; mask_token [D]
    # out:      out [B, N, D] contiguous; every element written once
    # numerics: a copy of the bits
    # bounds:   row and column tails are masked; offsets are int64
    # cost:     the unmasked rows read once, output written once
    pid = tl.program_id(0)
    cols = pid % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = pid // chunks % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    image = (pid // chunks // row_blocks).to(tl.int64)
    rows_ok = rows < tokens
    cols_ok = cols < columns
    masked = tl.load(mask_ptr + image * mask_stride + rows, mask=rows_ok, other=0) != 0
    source = x_ptr + image * x_stride_b + rows.to(tl.int64)[:, None] * x_stride_n + cols[None, :]
    value = tl.load(source, mask=(rows_ok & ~masked)[:, None] & cols_ok[None, :], other=0.0)
    token = tl.load(token_ptr + cols, mask=cols_ok, other=0.0)
    value = tl.where(masked[:, None], token[None, :], value)
    out = out_ptr + (image * tokens + rows)[:, None] * columns + cols[None, :]
    tl.store(out, value, mask=rows_ok[:, None] & cols_ok[None, :])


@triton.jit(do_not_specialize=_triton.SIZES)
def fill_mask_tokens_bwd_kernel(
    grad_ptr,
    mask_ptr,
    dx_ptr,
    dtoken_ptr,
    images,
    tokens,
    columns,
    per_group,
    row_blocks,
    chunks,
    grad_stride_b,
    grad_stride_n,
    mask_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # grid:     groups * row_blocks * chunks; a program owns BLOCK_R tokens, BLOCK_D columns wide, of a group of images
    # in:       grad [B, N, D] and mask bool [B, N], by stride, last stride 1
    # out:      dx [B, N, D] or None; dtoken [groups * row_blocks, D] partial sums, then, of fp32 rows, what they have
    #           lost, or None; contiguous, every element written once
    # numerics: dx is a copy of the bits; dtoken in fp32, of fp32 rows compensated, images ascending, then rows by a
    #           tree, rounded once
    # bounds:   row and column tails are masked; offsets are int64
    # cost:     grad read once (for dtoken alone, only its masked rows), dx written once; no atomics, deterministic
    pid = tl.program_id(0)
    cols = pid % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = pid // chunks % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    part = (pid // chunks).to(tl.int64)
    rows_ok = rows < tokens
    cols_ok = cols < columns
    first = part // row_blocks * per_group
    COMPENSATED: tl.constexpr = grad_ptr.dtype.element_ty == tl.float32
    dtoken = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    lost = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for i in range(tl.minimum(images - first, per_group).to(tl.int32)):
        image = first + i
        masked = tl.load(mask_ptr + image * mask_stride + rows, mask=rows_ok, other=0) != 0
        wanted = rows_ok
        if dx_ptr is None:
            wanted = rows_ok & masked
        if dtoken_ptr is None:
            wanted = rows_ok & ~masked
        source = grad_ptr + image * grad_stride_b + rows.to(tl.int64)[:, None] * grad_stride_n + cols[None, :]
        grad = tl.load(source, mask=wanted[:, None] & cols_ok[None, :], other=0.0)
        if dx_ptr is not None:
            dx = dx_ptr + (image * tokens + rows)[:, None] * columns + cols[None, :]
            kept = tl.where(masked[:, None], 0.0, grad).to(dx_ptr.dtype.element_ty)
            tl.store(dx, kept, mask=rows_ok[:, None] & cols_ok[None, :])
        if dtoken_ptr is not None:
            dtoken, lost = add_term(dtoken, lost, tl.where(masked[:, None], widen(grad), 0.0), COMPENSATED)
    if dtoken_ptr is not None:
        parts = tl.cdiv(images, per_group) * row_blocks
        total, lost = add_rows(dtoken, lost, COMPENSATED)
        store_sum(dtoken_ptr + part * columns + cols, total, lost, parts, columns, cols_ok, COMPENSATED)


def fill_mask_tokens_fwd(x: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    out = x.new_empty(x.shape)  # [B, N, D]
    if out.numel() == 0:
        return out
    images, tokens, columns = x.shape
    block_r, block_d, warps = _triton.tile(*x.shape, itemsize=x.element_size())
    row_blocks, chunks = triton.cdiv(tokens, block_r), triton.cdiv(columns, block_d)
    _triton.launch(
        fill_mask_tokens_fwd_kernel,
        images * row_blocks * chunks,
        x,
        *(x, mask, mask_token, out),
        *(tokens, columns, row_blocks, chunks),
        *(x.stride(0), x.stride(1), mask.stride(0)),
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return out


def fill_mask_tokens_bwd(grad: Tensor, mask: Tensor, need_x: bool, need_mask_token: bool) -> tuple[Tensor, Tensor]:
    images, tokens, columns = grad.shape
    dx = grad.new_empty(grad.shape if need_x else (0,))
    if grad.numel() == 0 or not (need_x or need_mask_token):
        return dx, grad.new_zeros((columns,) if need_mask_token else (0,))
    block_r, block_d, warps = _triton.tile(*grad.shape, itemsize=grad.element_size())
    row_blocks, chunks = triton.cdiv(tokens, block_r), triton.cdiv(columns, block_d)
    groups, per_group, partial, dtoken = images, 1, None, grad.new_empty(0)
    if need_mask_token:
        groups, per_group = _triton.batch_groups(images, row_blocks * chunks)
        partial, dtoken = _triton.partials(groups * row_blocks, (columns,), grad, compensated=True)
    _triton.launch(
        fill_mask_tokens_bwd_kernel,
        groups * row_blocks * chunks,
        grad,
        *(grad, mask, dx if need_x else None, partial),
        *(images, tokens, columns, per_group, row_blocks, chunks),
        *(grad.stride(0), grad.stride(1), mask.stride(0)),
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return dx, _triton.sum_partials(partial, dtoken) if need_mask_token else dtoken
