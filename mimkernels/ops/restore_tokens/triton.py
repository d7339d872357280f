"""Triton kernels of restore_tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _triton
from mimkernels.ops._triton import add_rows, add_term, gathered_sum, narrow, rest, store_sum, valid_id, widen


@triton.jit(do_not_specialize=_triton.SIZES)
def restore_tokens_fwd_kernel(
    x_ptr,
    ids_ptr,
    token_ptr,
    pos_ptr,
    out_ptr,
    images,
    tokens,
    kept,
    num_prefix,
    columns,
    chunks,
    x_stride_b,
    x_stride_n,
    ids_stride,
    pos_stride,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # grid:     cdiv(B, BLOCK_B) * (P + N) * chunks; a program owns one output row of BLOCK_B images, BLOCK_D columns
    #           wide, so that its row of pos is loaded once and neighbouring programs write neighbouring rows
    # in:       x [B, P + K, D], ids_restore int64 [B, N], mask_token [D], pos [P + N, D] or None, last stride 1
    # out:      out [B, P + N, D] contiguous; every element written once
    # numerics: token + pos in fp32, rounded once; without pos a copy of the bits
    # bounds:   tails are masked; an id outside [0, N) reads as zeros; offsets are int64
    # cost:     x read once, output written once; pos read cdiv(B, BLOCK_B) times, from L2
    pid = tl.program_id(0)
    length = num_prefix + tokens
    cols = pid % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    row = pid // chunks % length
    image = (pid // chunks // length).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    cols_ok = cols < columns
    is_prefix = row < num_prefix
    ids = tl.load(ids_ptr + image * ids_stride + (row - num_prefix), mask=(image < images) & ~is_prefix, other=-2)
    ids = valid_id(ids, tokens)
    source = tl.where(is_prefix, row, num_prefix + ids)
    from_x = (image < images) & (is_prefix | ((ids >= 0) & (ids < kept)))
    offsets = image * x_stride_b + source.to(tl.int64) * x_stride_n
    value = tl.load(x_ptr + offsets[:, None] + cols[None, :], mask=from_x[:, None] & cols_ok[None, :], other=0.0)
    token = tl.load(token_ptr + cols, mask=cols_ok, other=0.0)
    value = tl.where((ids >= kept)[:, None], token[None, :], value)
    if pos_ptr is not None:
        pos = tl.load(pos_ptr + row.to(tl.int64) * pos_stride + cols, mask=cols_ok, other=0.0)
        value = narrow(widen(value) + widen(pos)[None, :], out_ptr.dtype.element_ty)
    out = out_ptr + (image * length + row)[:, None] * columns + cols[None, :]
    tl.store(out, value, mask=(image < images)[:, None] & cols_ok[None, :])


@triton.jit(do_not_specialize=_triton.SIZES)
def restore_tokens_bwd_x_kernel(
    grad_ptr,
    ids_ptr,
    dx_ptr,
    tokens,
    kept,
    num_prefix,
    columns,
    row_blocks,
    chunks,
    ids_stride,
    grad_stride_b,
    grad_stride_r,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # grid:     B * row_blocks * chunks; a program owns BLOCK_R rows of dx of one image, BLOCK_D columns wide
    # in:       grad [B, P + N, D] and ids_restore int64 [B, N], by stride, last stride 1
    # out:      dx [B, P + K, D] contiguous; every element written once, zeros where a row was never used
    # numerics: fp32 sums, output tokens ascending, of fp32 rows compensated; rounded once
    # bounds:   tails are masked; ids outside [0, K) match nothing; offsets are int64
    # cost:     the rows of kept tokens read once, dx written once; ids read row_blocks * chunks times, from L2
    pid = tl.program_id(0)
    cols = pid % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = pid // chunks % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    image = (pid // chunks // row_blocks).to(tl.int64)
    cols_ok = cols < columns
    length = num_prefix + kept
    is_prefix = (rows < num_prefix)[:, None] & cols_ok[None, :]
    source = grad_ptr + image * grad_stride_b + rows.to(tl.int64)[:, None] * grad_stride_r + cols[None, :]
    prefix = widen(tl.load(source, mask=is_prefix, other=0.0))
    acc, lost = gathered_sum(
        ids_ptr,
        grad_ptr,
        rows - num_prefix,
        (rows >= num_prefix) & (rows < length),
        cols,
        cols_ok,
        image,
        1,
        kept,
        tokens,
        num_prefix,
        0,
        ids_stride,
        0,
        grad_stride_b,
        grad_stride_r,
        BLOCK_R,
        BLOCK_D,
        BLOCK_K,
    )
    acc = tl.where(is_prefix, prefix, acc + rest(lost))
    dx = dx_ptr + (image * length + rows)[:, None] * columns + cols[None, :]
    tl.store(dx, narrow(acc, dx_ptr.dtype.element_ty), mask=(rows < length)[:, None] & cols_ok[None, :])


@triton.jit(do_not_specialize=_triton.SIZES)
def restore_tokens_bwd_sums_kernel(
    grad_ptr,
    ids_ptr,
    dtoken_ptr,
    dpos_ptr,
    images,
    tokens,
    kept,
    num_prefix,
    columns,
    per_group,
    row_blocks,
    chunks,
    ids_stride,
    grad_stride_b,
    grad_stride_r,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # grid:     groups * row_blocks * chunks; a program adds BLOCK_R rows, BLOCK_D columns wide, over a group of images
    # in:       grad [B, P + N, D] and ids_restore int64 [B, N], by stride, last stride 1
    # out:      dtoken [groups * row_blocks, D] or None, dpos [groups, P + N, D] or None: partial sums, then, of fp32
    #           rows, what they have lost; contiguous, every element written once
    # numerics: fp32, of fp32 rows compensated; images ascending, then for dtoken the rows by a tree: the order depends
    #           on sizes alone
    # bounds:   tails are masked; ids outside [K, N) are no mask tokens; offsets are int64
    # cost:     for dpos grad is read once, for dtoken alone only its masked rows; no atomics, deterministic
    pid = tl.program_id(0)
    cols = pid % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = pid // chunks % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    part = (pid // chunks).to(tl.int64)
    group = part // row_blocks
    cols_ok = cols < columns
    length = num_prefix + tokens
    is_token = (rows >= num_prefix) & (rows < length)
    first = group * per_group
    COMPENSATED: tl.constexpr = grad_ptr.dtype.element_ty == tl.float32
    dpos = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    dpos_lost = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    dtoken = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    dtoken_lost = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for i in range(tl.minimum(images - first, per_group).to(tl.int32)):
        image = first + i
        wanted = rows < length
        if dtoken_ptr is not None:
            ids = tl.load(ids_ptr + image * ids_stride + (rows - num_prefix), mask=is_token, other=-2)
            masked = valid_id(ids, tokens) >= kept
            if dpos_ptr is None:
                wanted = masked
        source = grad_ptr + image * grad_stride_b + rows.to(tl.int64)[:, None] * grad_stride_r + cols[None, :]
        grad = widen(tl.load(source, mask=wanted[:, None] & cols_ok[None, :], other=0.0))
        if dpos_ptr is not None:
            dpos, dpos_lost = add_term(dpos, dpos_lost, grad, COMPENSATED)
        if dtoken_ptr is not None:
            dtoken, dtoken_lost = add_term(dtoken, dtoken_lost, tl.where(masked[:, None], grad, 0.0), COMPENSATED)
    groups = tl.cdiv(images, per_group)
    if dpos_ptr is not None:
        dst = dpos_ptr + (group * length + rows)[:, None] * columns + cols[None, :]
        mask = (rows < length)[:, None] & cols_ok[None, :]
        store_sum(dst, dpos, dpos_lost, groups, length * columns, mask, COMPENSATED)
    if dtoken_ptr is not None:
        total, lost = add_rows(dtoken, dtoken_lost, COMPENSATED)
        dst = dtoken_ptr + part * columns + cols
        store_sum(dst, total, lost, groups * row_blocks, columns, cols_ok, COMPENSATED)


def restore_tokens_fwd(
    x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos: Tensor | None, num_prefix: int
) -> Tensor:
    images, length, columns = x.shape
    tokens = ids_restore.shape[1]
    _triton.check_ids("restore_tokens", "ids_restore", ids_restore, tokens)
    out = x.new_empty((images, num_prefix + tokens, columns))  # [B, P + N, D]
    if out.numel() == 0:
        return out
    block_b, block_d, warps = _triton.tile(out.shape[1], images, columns, itemsize=out.element_size())
    chunks = triton.cdiv(columns, block_d)
    _triton.launch(
        restore_tokens_fwd_kernel,
        triton.cdiv(images, block_b) * out.shape[1] * chunks,
        x,
        *(x, ids_restore, mask_token, pos, out),
        *(images, tokens, length - num_prefix, num_prefix, columns, chunks),
        *(x.stride(0), x.stride(1), ids_restore.stride(0), 0 if pos is None else pos.stride(0)),
        BLOCK_B=block_b,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return out


def restore_tokens_bwd(
    grad: Tensor,
    ids_restore: Tensor,
    kept: int,
    num_prefix: int,
    need_x: bool,
    need_mask_token: bool,
    need_pos: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    images, length, columns = grad.shape
    _triton.check_ids("restore_tokens", "ids_restore", ids_restore, ids_restore.shape[1])
    dx = grad.new_empty((images, num_prefix + kept, columns) if need_x else (0,))
    if grad.numel() == 0:
        dtoken = grad.new_zeros((columns,) if need_mask_token else (0,))
        return dx.zero_(), dtoken, grad.new_zeros((length, columns) if need_pos else (0,))
    if dx.numel():
        _bwd_x(grad, ids_restore, dx, kept, num_prefix)
    dtoken, dpos = _bwd_sums(grad, ids_restore, kept, num_prefix, need_mask_token, need_pos)
    return dx, dtoken, dpos


def _bwd_x(grad: Tensor, ids_restore: Tensor, dx: Tensor, kept: int, num_prefix: int) -> None:
    columns, tokens = grad.shape[2], ids_restore.shape[1]
    block_r, block_d, warps = _triton.tile(*dx.shape, itemsize=dx.element_size())
    row_blocks, chunks = triton.cdiv(dx.shape[1], block_r), triton.cdiv(columns, block_d)
    _triton.launch(
        restore_tokens_bwd_x_kernel,
        dx.shape[0] * row_blocks * chunks,
        grad,
        *(grad, ids_restore, dx),
        *(tokens, kept, num_prefix, columns, row_blocks, chunks),
        *(ids_restore.stride(0), grad.stride(0), grad.stride(1)),
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        BLOCK_K=_triton.match_block(tokens, block_r),
        num_warps=warps,
        maxnreg=_triton.SUM_REGISTERS,
    )


def _bwd_sums(
    grad: Tensor, ids_restore: Tensor, kept: int, num_prefix: int, need_mask_token: bool, need_pos: bool
) -> tuple[Tensor, Tensor]:
    images, length, columns = grad.shape
    dtoken, token_out = None, grad.new_empty(0)
    dpos, pos_out = None, grad.new_empty(0)
    if not (need_mask_token or need_pos):
        return token_out, pos_out
    block_r, block_d, warps = _triton.tile(*grad.shape, itemsize=grad.element_size())
    if need_mask_token and need_pos:
        # Two sums in registers at once: half a tile each.
        block_r = max(1, block_r // 2)
    row_blocks, chunks = triton.cdiv(length, block_r), triton.cdiv(columns, block_d)
    groups, per_group = _triton.batch_groups(images, row_blocks * chunks)
    if need_mask_token:
        dtoken, token_out = _triton.partials(groups * row_blocks, (columns,), grad, compensated=True)
    if need_pos:
        dpos, pos_out = _triton.partials(groups, (length, columns), grad, compensated=True)
    _triton.launch(
        restore_tokens_bwd_sums_kernel,
        groups * row_blocks * chunks,
        grad,
        *(grad, ids_restore, dtoken, dpos),
        *(images, ids_restore.shape[1], kept, num_prefix, columns, per_group, row_blocks, chunks),
        *(ids_restore.stride(0), grad.stride(0), grad.stride(1)),
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=warps,
        maxnreg=_triton.SUM_REGISTERS,
    )
    if need_mask_token:
        _triton.sum_partials(dtoken, token_out)
    if need_pos:
        _triton.sum_partials(dpos, pos_out)
    return token_out, pos_out
