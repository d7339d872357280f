"""Triton kernels of reduce_pool."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _triton
from mimkernels.ops._triton import narrow, widen
from mimkernels.ops._triton_pool import allowed_tokens
from mimkernels.ops.reduce_pool.spec import KINDS

MEAN, MAX, GEM = (tl.constexpr(KINDS.index(kind)) for kind in ("mean", "max", "gem"))
NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def at_least(x, eps):
    # max(x, eps), NaN for NaN.
    return tl.where(x < eps, eps, x)


@triton.jit
def power(log_z, p):
    # z^p of positive z, infinity and NaN included; z^0 = 1 even of these.
    return tl.exp(tl.where(p == 0.0, 0.0, p * log_z))


@triton.jit(do_not_specialize=_triton.SIZES)
def reduce_pool_fwd_kernel(
    x_ptr,
    mask_ptr,
    p_ptr,
    out_ptr,
    saved_ptr,
    eps,
    tokens,
    dim,
    num_prefix,
    column_blocks,
    x_stride_b,
    x_stride_n,
    mask_stride,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # grid:     B * column_blocks; a program owns BLOCK_D columns of one image and loops over the tokens
    # in:       x [B, N, D] by stride, last stride 1; mask [B, N] bool or None; p fp32 [1] for GEM
    # out:      out [B, D]; saved [B, D]: for MAX int32, the first largest token or -1, for GEM fp32, the mean of the
    #           powers, for MEAN None; every element written once
    # numerics: fp32, blocks of tokens in order; powers as exp(p log x)
    # bounds:   tails and tokens that are not allowed count nothing; offsets are int64
    # cost:     x read once; no atomics, deterministic
    pid = tl.program_id(0)
    b = (pid // column_blocks).to(tl.int64)
    cols = pid % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    cols_ok = cols < dim
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    index = tl.full([BLOCK_D], -1, dtype=tl.int32)
    counted = tl.zeros([BLOCK_N], dtype=tl.int32)
    p = 1.0
    if KIND == GEM:
        p = tl.load(p_ptr)
    for start in range(0, tokens, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        ok = allowed_tokens(n, b, mask_ptr, mask_stride, num_prefix, tokens)
        counted += ok.to(tl.int32)
        at = x_ptr + b * x_stride_b + n.to(tl.int64)[:, None] * x_stride_n + cols[None, :]
        x = widen(tl.load(at, mask=ok[:, None] & cols_ok[None, :], other=0.0))
        if KIND == MEAN:
            acc += tl.sum(x, axis=0)
        elif KIND == GEM:
            acc += tl.sum(tl.where(ok[:, None], power(tl.log(at_least(x, eps)), p), 0.0), axis=0)
        else:
            number = ok[:, None] & (x == x)
            top = tl.max(tl.where(number, x, float("-inf")), axis=0)
            at_top = tl.min(tl.where(number & (x == top[None, :]), n[:, None], NO_TOKEN), axis=0)
            at_nan = tl.min(tl.where(ok[:, None] & (x != x), n[:, None], NO_TOKEN), axis=0)
            is_nan = at_nan != NO_TOKEN
            found = tl.where(is_nan, at_nan, at_top)
            larger = (index < 0) | ((acc == acc) & (is_nan | (top > acc)))
            larger = larger & (found != NO_TOKEN)
            acc = tl.where(larger, tl.where(is_nan, float("nan"), top), acc)
            index = tl.where(larger, found, index)
    count = tl.sum(counted, axis=0)
    place = b * dim + cols
    if KIND == MAX:
        tl.store(saved_ptr + place, index, mask=cols_ok)
    else:
        acc = acc / tl.maximum(count, 1).to(tl.float32)
    if KIND == GEM:
        tl.store(saved_ptr + place, acc, mask=cols_ok)
        some = count > 0
        acc = tl.where(some, tl.exp(tl.log(tl.where(some, acc, 1.0)) / p), 0.0)
    tl.store(out_ptr + place, narrow(acc, out_ptr.dtype.element_ty), mask=cols_ok)


@triton.jit(do_not_specialize=_triton.SIZES)
def reduce_pool_bwd_kernel(
    dout_ptr,
    x_ptr,
    saved_ptr,
    mask_ptr,
    p_ptr,
    dx_ptr,
    dp_ptr,
    eps,
    tokens,
    dim,
    num_prefix,
    column_blocks,
    dout_stride,
    x_stride_b,
    x_stride_n,
    mask_stride,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # grid:     B * column_blocks; a program owns BLOCK_D columns of one image and loops over the tokens
    # in:       dout [B, D] and, for GEM, x [B, N, D], by stride, last stride 1; saved [B, D] of the forward; mask
    #           [B, N] bool or None; p fp32 [1] for GEM
    # out:      dx [B, N, D] or None; dp fp32 [B, column_blocks] or None, each program's share; every element written
    #           once
    # numerics: fp32, rounded once; with M the mean of the powers and z = max(x, eps),
    #           dx = dout M^(1/p - 1) z^(p - 1) / count unless x < eps,
    #           dp = dout M^(1/p - 1) mean of z^p (log z - log M / p) / p; both 0 where M is
    # bounds:   tails are masked, zeros where a token is not allowed; offsets are int64
    # cost:     x read once (GEM), dx written once; no atomics, deterministic
    pid = tl.program_id(0)
    b = (pid // column_blocks).to(tl.int64)
    cols = pid % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    cols_ok = cols < dim
    factor = widen(tl.load(dout_ptr + b * dout_stride + cols, mask=cols_ok, other=0.0))
    index = tl.full([BLOCK_D], -1, dtype=tl.int32)
    center = tl.zeros([BLOCK_D], dtype=tl.float32)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    p = 1.0
    if KIND == MAX:
        index = tl.load(saved_ptr + b * dim + cols, mask=cols_ok, other=-1)
    else:
        counted = tl.zeros([BLOCK_N], dtype=tl.int32)
        for start in range(0, tokens, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            counted += allowed_tokens(n, b, mask_ptr, mask_stride, num_prefix, tokens).to(tl.int32)
        count = tl.sum(counted, axis=0)
        factor = factor / tl.maximum(count, 1).to(tl.float32)
        if KIND == GEM:
            p = tl.load(p_ptr)
            moment = tl.load(saved_ptr + b * dim + cols, mask=cols_ok & (count > 0), other=1.0)
            factor = tl.where(moment == 0.0, 0.0, factor)
            moment = tl.where(moment == 0.0, 1.0, moment)
            log_moment = tl.log(moment)
            center = log_moment / p
            # M^(1/p - 1) = M^(1/p) / M, rounded less, where M is finite.
            not_finite = power(log_moment, 1.0 / p - 1.0)
            factor = factor * tl.where(moment < float("inf"), tl.exp(center) / moment, not_finite)
    for start in range(0, tokens, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        ok = allowed_tokens(n, b, mask_ptr, mask_stride, num_prefix, tokens)[:, None] & cols_ok[None, :]
        dx = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32) + factor[None, :]
        if KIND == MAX:
            ok = ok & (n[:, None] == index[None, :])
        elif KIND == GEM:
            at = x_ptr + b * x_stride_b + n.to(tl.int64)[:, None] * x_stride_n + cols[None, :]
            x = widen(tl.load(at, mask=ok, other=1.0))
            z = at_least(x, eps)
            log_z = tl.log(z)
            slope = power(log_z, p - 1.0)
            if dp_ptr is not None:
                acc += tl.sum(tl.where(ok, slope * z * (log_z - center[None, :]), 0.0), axis=0)
            dx = dx * slope
            ok = ok & ~(x < eps)  # that of NaN is NaN
        if dx_ptr is not None:
            out = dx_ptr + (b * tokens + n)[:, None] * dim + cols[None, :]
            dx = narrow(tl.where(ok, dx, 0.0), dx_ptr.dtype.element_ty)
            tl.store(out, dx, mask=(n < tokens)[:, None] & cols_ok[None, :])
    if dp_ptr is not None:
        tl.store(dp_ptr + pid, tl.sum(factor * acc, axis=0) / p)


def reduce_pool_fwd(
    x: Tensor, mask: Tensor | None, kind: int, num_prefix: int, p: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    batch, tokens, dim = x.shape
    out = x.new_empty((batch, dim))
    saved = x.new_empty((0,), dtype=torch.float32)
    if kind != MEAN.value:
        saved = x.new_empty((batch, dim), dtype=torch.int32 if kind == MAX.value else torch.float32)
    if out.numel():
        block_n, block_d, blocks = _blocks(batch, tokens, dim)
        _triton.launch(
            reduce_pool_fwd_kernel,
            batch * blocks,
            x,
            *(x, mask, p, out, None if kind == MEAN.value else saved, eps, tokens, dim, num_prefix, blocks),
            *(x.stride(0), x.stride(1), 0 if mask is None else mask.stride(0)),
            KIND=kind,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=4,
            maxnreg=_triton.SUM_REGISTERS,
        )
    return out, saved


def reduce_pool_bwd(
    dout: Tensor,
    x: Tensor | None,
    saved: Tensor,
    mask: Tensor | None,
    kind: int,
    tokens: int,
    num_prefix: int,
    p: Tensor | None,
    eps: float,
    need_x: bool,
    need_p: bool,
) -> tuple[Tensor, Tensor]:
    batch, dim = dout.shape
    dx = dout.new_empty((batch, tokens, dim) if need_x else (0,))
    dp = dout.new_empty((1,) if need_p else (0,), dtype=torch.float32)
    if dout.numel() == 0 or tokens == 0:
        return dx, dp.zero_()
    block_n, block_d, blocks = _blocks(batch, tokens, dim)
    shares = dout.new_empty((batch * blocks, 1), dtype=torch.float32) if need_p else None
    _triton.launch(
        reduce_pool_bwd_kernel,
        batch * blocks,
        dout,
        *(dout, x, None if kind == MEAN.value else saved, mask, p, dx if need_x else None, shares),
        *(eps, tokens, dim, num_prefix, blocks, dout.stride(0)),
        *((0, 0) if x is None else (x.stride(0), x.stride(1))),
        0 if mask is None else mask.stride(0),
        KIND=kind,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=4,
        maxnreg=_triton.SUM_REGISTERS,
    )
    return dx, _triton.sum_partials(shares, dp) if need_p else dp


def _blocks(batch: int, tokens: int, dim: int) -> tuple[int, int, int]:
    """(BLOCK_N, BLOCK_D, column blocks): narrow columns, so that few images still fill a device."""
    block_d = _triton.column_block(dim, 128 if batch >= 64 else 64)
    block_n = max(2, min(triton.next_power_of_2(max(tokens, 1)), 2048 // block_d))
    return block_n, block_d, triton.cdiv(dim, block_d)
