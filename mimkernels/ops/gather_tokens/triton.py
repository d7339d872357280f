"""Triton kernels of gather_tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _checks, _triton
from mimkernels.ops._triton import add_sums, gathered_sum, narrow, rest, store_sum, valid_id, widen


@triton.jit(do_not_specialize=_triton.SIZES)
def gather_tokens_fwd_kernel(
    x_ptr,
    ids_ptr,
    pos_ptr,
    prefix_ptr,
    out_ptr,
    images,
    tokens,
    kept,
    num_prefix,
    columns,
    row_blocks,
    chunks,
    x_stride_b,
    x_stride_n,
    ids_stride_m,
    ids_stride_b,
    pos_stride,
    prefix_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # grid:     M * B * row_blocks * chunks; a program owns BLOCK_R output rows of one sample, BLOCK_D columns wide
    # in:       x [B, N, D], ids int64 [M, B, K], pos [N, D] or None, prefix [P, D] or None, by stride, last stride 1
    # out:      out [M * B, P + K, D] contiguous; every element written once
    # numerics: x + pos in fp32, rounded once; without pos, and for the prefix, a copy of the bits
    # bounds:   row and column tails are masked; an id outside [0, N) reads as zeros; offsets are int64
    # cost:     kept rows read once, output written once; pos and prefix come from L2
    pid = tl.program_id(0)
    cols = pid % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = pid // chunks % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    sample = pid // chunks // row_blocks
    m = (sample // images).to(tl.int64)
    b = (sample % images).to(tl.int64)
    cols_ok = (cols < columns)[None, :]
    ks = rows - num_prefix
    is_token = (ks >= 0) & (ks < kept)
    ids = tl.load(ids_ptr + m * ids_stride_m + b * ids_stride_b + ks, mask=is_token, other=-2)
    ids = valid_id(ids, tokens)
    ok = (ids >= 0)[:, None] & cols_ok
    source = ids.to(tl.int64)[:, None]
    value = tl.load(x_ptr + b * x_stride_b + source * x_stride_n + cols[None, :], mask=ok, other=0.0)
    if pos_ptr is not None:
        pos = tl.load(pos_ptr + source * pos_stride + cols[None, :], mask=ok, other=0.0)
        value = narrow(widen(value) + widen(pos), out_ptr.dtype.element_ty)
    if prefix_ptr is not None:
        is_prefix = (ks < 0)[:, None]
        first = prefix_ptr + rows.to(tl.int64)[:, None] * prefix_stride + cols[None, :]
        value = tl.where(is_prefix, tl.load(first, mask=is_prefix & cols_ok, other=0.0), value)
    length = num_prefix + kept
    out = out_ptr + (sample.to(tl.int64) * length + rows)[:, None] * columns + cols[None, :]
    tl.store(out, value, mask=(rows < length)[:, None] & cols_ok)


@triton.jit(do_not_specialize=_triton.SIZES)
def gather_tokens_bwd_kernel(
    grad_ptr,
    ids_ptr,
    dx_ptr,
    dpos_ptr,
    images,
    masks,
    tokens,
    kept,
    num_prefix,
    columns,
    per_group,
    row_blocks,
    chunks,
    ids_stride_m,
    ids_stride_b,
    grad_stride_m,
    grad_stride_b,
    grad_stride_r,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # grid:     groups * row_blocks * chunks; a program owns BLOCK_R tokens, BLOCK_D columns wide, of a group of images
    # in:       grad [M * B, P + K, D] and ids int64 [M, B, K], by stride, last stride 1
    # out:      dx [B, N, D] or None; dpos [groups, N, D] partial sums over the group's images, then, of fp32 rows, what
    #           they have lost, or None; contiguous, every element written once, zeros where nothing was gathered
    # numerics: fp32 sums, of fp32 rows compensated, m then k ascending, then images ascending; rounded at the store
    # bounds:   tails are masked; ids outside [0, N) match nothing; offsets are int64
    # cost:     grad read once, dx written once; ids read row_blocks * chunks times, from L2; no atomics, deterministic
    pid = tl.program_id(0)
    cols = pid % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = pid // chunks % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    group = (pid // chunks // row_blocks).to(tl.int64)
    cols_ok = cols < columns
    rows_ok = rows < tokens
    ok = rows_ok[:, None] & cols_ok[None, :]
    first = group * per_group
    COMPENSATED: tl.constexpr = grad_ptr.dtype.element_ty == tl.float32
    total = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    total_lost = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for i in range(tl.minimum(images - first, per_group).to(tl.int32)):
        image = first + i
        acc, lost = gathered_sum(
            ids_ptr,
            grad_ptr,
            rows,
            rows_ok,
            cols,
            cols_ok,
            image,
            masks,
            tokens,
            kept,
            num_prefix,
            ids_stride_m,
            ids_stride_b,
            grad_stride_m,
            grad_stride_b,
            grad_stride_r,
            BLOCK_R,
            BLOCK_D,
            BLOCK_K,
        )
        if dx_ptr is not None:
            dx = dx_ptr + (image * tokens + rows)[:, None] * columns + cols[None, :]
            tl.store(dx, narrow(acc + rest(lost), dx_ptr.dtype.element_ty), mask=ok)
        if dpos_ptr is not None:
            if COMPENSATED:
                total, total_lost = add_sums(total, total_lost, acc, lost)
            else:
                total += acc
    if dpos_ptr is not None:
        dpos = dpos_ptr + (group * tokens + rows)[:, None] * columns + cols[None, :]
        parts = tl.cdiv(images, per_group)
        store_sum(dpos, total, total_lost, parts, tokens * columns, ok, COMPENSATED)


def gather_tokens_fwd(x: Tensor, ids: Tensor, pos: Tensor | None, prefix: Tensor | None) -> Tensor:
    images, tokens, columns = x.shape
    ids = _checks.as_masks(ids)
    masks, _, kept = ids.shape
    num_prefix = 0 if prefix is None else prefix.shape[0]
    _triton.check_ids("gather_tokens", "ids", ids, tokens)
    out = x.new_empty((masks * images, num_prefix + kept, columns))  # [M * B, P + K, D]
    if out.numel() == 0:
        return out
    block_r, block_d, warps = _triton.tile(*out.shape, itemsize=out.element_size())
    row_blocks, chunks = triton.cdiv(out.shape[1], block_r), triton.cdiv(columns, block_d)
    _triton.launch(
        gather_tokens_fwd_kernel,
        out.shape[0] * row_blocks * chunks,
        x,
        *(x, ids, pos, prefix, out),
        *(images, tokens, kept, num_prefix, columns, row_blocks, chunks),
        *(x.stride(0), x.stride(1), ids.stride(0), ids.stride(1)),
        *(0 if pos is None else pos.stride(0), 0 if prefix is None else prefix.stride(0)),
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return out


def gather_tokens_bwd(
    grad: Tensor, ids: Tensor, tokens: int, num_prefix: int, need_x: bool, need_pos: bool, need_prefix: bool
) -> tuple[Tensor, Tensor, Tensor]:
    ids = _checks.as_masks(ids)
    masks, images, kept = ids.shape
    columns = grad.shape[2]
    _triton.check_ids("gather_tokens", "ids", ids, tokens)
    dprefix = grad.new_empty((num_prefix, columns) if need_prefix else (0,))
    if dprefix.numel():
        dprefix = _triton.batch_sum(grad, num_prefix) if grad.shape[0] else dprefix.zero_()
    dx = grad.new_empty((images, tokens, columns) if need_x else (0,))
    if grad.numel() == 0 or tokens == 0 or not (need_x or need_pos):
        return dx.zero_(), grad.new_zeros((tokens, columns) if need_pos else (0,)), dprefix
    block_r, block_d, warps = _triton.tile(images, tokens, columns, itemsize=grad.element_size())
    if need_pos:
        # Two sums in registers at once: half a tile each.
        block_r = max(1, block_r // 2)
    row_blocks, chunks = triton.cdiv(tokens, block_r), triton.cdiv(columns, block_d)
    groups, per_group = _triton.batch_groups(images, row_blocks * chunks) if need_pos else (images, 1)
    partial, dpos = (None, grad.new_empty(0))
    if need_pos:
        partial, dpos = _triton.partials(groups, (tokens, columns), grad, compensated=True)
    _triton.launch(
        gather_tokens_bwd_kernel,
        groups * row_blocks * chunks,
        grad,
        *(grad, ids, dx if need_x else None, partial),
        *(images, masks, tokens, kept, num_prefix, columns, per_group, row_blocks, chunks),
        *(ids.stride(0), ids.stride(1), images * grad.stride(0), grad.stride(0), grad.stride(1)),
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        BLOCK_K=_triton.match_block(kept, block_r),
        num_warps=warps,
        maxnreg=_triton.SUM_REGISTERS,
    )
    return dx, _triton.sum_partials(partial, dpos) if need_pos else dpos, dprefix
