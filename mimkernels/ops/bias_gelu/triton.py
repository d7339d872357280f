"""Triton kernels of bias_gelu."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _triton
from mimkernels.ops._triton import add_rows, add_term, narrow, store_sum, widen


@triton.jit
def gelu_tail(x, TANH: tl.constexpr):
    # gelu(x) = x F(x), F the normal distribution function, or the logistic function that the tanh approximation puts
    # in its place: F(-|x|) and gelu'(-|x|), from which F(x) = 1 - F(-x) gives the other half.
    magnitude = tl.abs(x)
    a = tl.minimum(magnitude, 20.0)  # from here on the exponentials are 0
    a2 = a * a
    if TANH:
        # F(-a) = e / (1 + e), e = exp(-2 z), z = sqrt(2 / pi) (a + 0.044715 a^3)
        e = tl.exp2(-a * (0.102943240 * a2 + 2.30220820))
        mass = e / (1.0 + e)
        slope = mass - magnitude * (mass * (1.0 - mass) * (0.214064449 * a2 + 1.59576912))
    else:
        # F(-a) = exp(-a * a / 2) P(a) / Q(a), P / Q the minimax approximation of erfcx(a / sqrt(2)) / 2 on
        # [0, 13.27], relative error 5e-9
        density = tl.exp2(-0.721347520 * a2)
        p = 4.01768789e-3 * a + 3.99672002e-2
        p = (p * a + 0.1812562) * a + 0.435617684
        p = p * a + 0.5
        q = 1.00707062e-2 * a + 0.100190321
        q = (q * a + 0.464246900) * a + 1.19427359
        q = (q * a + 1.66912029) * a + 1.0
        mass = density * (p / q)
        slope = mass - 0.398942280 * density * magnitude
    return mass, slope


@triton.jit
def row_offsets(rows, tokens, stride_a, stride_r):
    # Where row i of [A * R] starts in a tensor [A, R, E].
    return (rows // tokens) * stride_a + (rows % tokens) * stride_r


@triton.jit(do_not_specialize=_triton.SIZES)
def bias_gelu_fwd_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    rows,
    tokens,
    columns,
    chunks,
    x_stride_a,
    x_stride_r,
    TANH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # grid:     cdiv(A * R, BLOCK_R) * chunks; a program owns BLOCK_R rows, BLOCK_D columns wide
    # in:       x [A, R, E] by stride, last stride 1; bias [E] in x's dtype, fp32 or None
    # out:      out [A, R, E] contiguous; every element written once
    # numerics: added and evaluated in fp32, rounded once
    # bounds:   row and column tails are masked; offsets are int64
    # cost:     x read once, out written once
    pid = tl.program_id(0)
    cols = pid % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    row = (pid // chunks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols_ok = cols < columns
    mask = (row < rows)[:, None] & cols_ok[None, :]
    source = x_ptr + row_offsets(row, tokens, x_stride_a, x_stride_r)[:, None] + cols[None, :]
    x = widen(tl.load(source, mask=mask, other=0.0))
    if bias_ptr is not None:
        x += widen(tl.load(bias_ptr + cols, mask=cols_ok, other=0.0))[None, :]
    mass = gelu_tail(x, TANH)[0]
    value = x * tl.where(x < 0.0, mass, 1.0 - mass)
    tl.store(out_ptr + row[:, None] * columns + cols[None, :], narrow(value, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_triton.SIZES)
def bias_gelu_bwd_kernel(
    grad_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    dbias_ptr,
    rows,
    tokens,
    columns,
    per_group,
    chunks,
    grad_stride_a,
    grad_stride_r,
    x_stride_a,
    x_stride_r,
    TANH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # grid:     groups * chunks; a program owns per_group blocks of BLOCK_R rows, BLOCK_D columns wide
    # in:       grad and x [A, R, E] by stride, last stride 1; bias [E] in x's dtype, fp32 or None
    # out:      dx [A, R, E] or None; dbias [groups, E] partial sums, then, of an fp32 bias, what they have lost, or
    #           None; contiguous, every element written once
    # numerics: fp32, dx rounded once; dbias sums rows BLOCK_R apart, then by a tree, for an fp32 bias compensated,
    #           rounded once
    # bounds:   row and column tails are masked; offsets are int64
    # cost:     grad and x read once, dx written once; no atomics, deterministic
    pid = tl.program_id(0)
    cols = pid % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    cols_ok = cols < columns
    group = (pid // chunks).to(tl.int64)
    bias = tl.zeros([BLOCK_D], dtype=tl.float32)
    if bias_ptr is not None:
        bias = widen(tl.load(bias_ptr + cols, mask=cols_ok, other=0.0))
    total = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    lost = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for step in range(per_group):
        row = (group * per_group + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & cols_ok[None, :]
        source = x_ptr + row_offsets(row, tokens, x_stride_a, x_stride_r)[:, None] + cols[None, :]
        x = widen(tl.load(source, mask=mask, other=0.0)) + bias[None, :]
        source = grad_ptr + row_offsets(row, tokens, grad_stride_a, grad_stride_r)[:, None] + cols[None, :]
        dx = widen(tl.load(source, mask=mask, other=0.0))
        slope = gelu_tail(x, TANH)[1]
        dx *= tl.where(x < 0.0, slope, 1.0 - slope)
        if dx_ptr is not None:
            target = dx_ptr + row[:, None] * columns + cols[None, :]
            tl.store(target, narrow(dx, dx_ptr.dtype.element_ty), mask=mask)
        if dbias_ptr is not None:
            COMPENSATED: tl.constexpr = bias_ptr.dtype.element_ty == tl.float32
            total, lost = add_term(total, lost, tl.where(mask, dx, 0.0), COMPENSATED)
    if dbias_ptr is not None:
        COMPENSATED: tl.constexpr = bias_ptr.dtype.element_ty == tl.float32
        total, lost = add_rows(total, lost, COMPENSATED)
        parts = tl.num_programs(0) // chunks
        store_sum(dbias_ptr + group * columns + cols, total, lost, parts, columns, cols_ok, COMPENSATED)


def bias_gelu_fwd(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    out = x.new_empty(x.shape)  # [A, R, E]
    if out.numel() == 0:
        return out
    images, tokens, columns = x.shape
    block_r, block_d, warps = _triton.tile(1, images * tokens, columns, itemsize=x.element_size())
    chunks = triton.cdiv(columns, block_d)
    _triton.launch(
        bias_gelu_fwd_kernel,
        triton.cdiv(images * tokens, block_r) * chunks,
        x,
        *(x, bias, out),
        *(images * tokens, tokens, columns, chunks),
        *(x.stride(0), x.stride(1)),
        TANH=tanh,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return out


def bias_gelu_bwd(
    grad: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, need_x: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    images, tokens, columns = x.shape
    rows = images * tokens
    need_bias = need_bias and bias is not None
    dx = x.new_empty(x.shape if need_x else (0,))
    if x.numel() == 0 or not (need_x or need_bias):
        return dx, (x if bias is None else bias).new_zeros((columns,) if need_bias else (0,))
    # Half a tile: two inputs are in flight, and the sums stay in registers.
    block_r, block_d, warps = _triton.tile(1, rows, columns, itemsize=2 * x.element_size())
    chunks = triton.cdiv(columns, block_d)
    groups, per_group = _triton.batch_groups(triton.cdiv(rows, block_r), chunks)
    partial, dbias = None, (x if bias is None else bias).new_empty(0)
    if need_bias and bias is not None:
        partial, dbias = _triton.partials(groups, (columns,), bias, compensated=True)
    _triton.launch(
        bias_gelu_bwd_kernel,
        groups * chunks,
        x,
        *(grad, x, bias, dx if need_x else None, partial),
        *(rows, tokens, columns, per_group, chunks),
        *(grad.stride(0), grad.stride(1), x.stride(0), x.stride(1)),
        TANH=tanh,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return dx, _triton.sum_partials(partial, dbias) if need_bias else dbias
