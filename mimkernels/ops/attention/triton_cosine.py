"""Triton kernel and device functions of cosine attention: lengths make cosines of the products of q and k."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _triton
from mimkernels.ops._triton import widen
from mimkernels.ops.attention.triton_blocks import INTEGERS, UNIT, along, load_rows, locate, strides

LARGEST_LOGIT_SCALE = tl.constexpr(4.605170185988092)  # ln 100
LEAST_LENGTH = tl.constexpr(1e-12)  # of q and k, as torch.nn.functional.normalize has it
LARGEST_HALF = tl.constexpr(65504.0)


@triton.jit(do_not_specialize=INTEGERS)
def cosine_factors_kernel(
    x_ptr,
    logit_ptr,
    out_ptr,
    scale,
    heads,
    queries,
    row_blocks,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # grid:     cdiv(N, BLOCK_M) * B * H, row blocks fastest; a program owns BLOCK_M rows of one head
    # in:       x, of q or k, [B, H, N, D] by stride in units of UNIT elements, last stride 1; logit_scale fp32 [H] or
    #           None
    # out:      scale * exp(min(logit_scale, ln 100)) / max(|x|, LEAST_LENGTH), without logit_scale scale / max(...),
    #           fp32 [B, H, N], contiguous, every element written once
    # numerics: rounded to fp32 once, but for the sum of squares of 16-bit rows, each of which is exact in fp32
    # bounds:   tails are masked; offsets are int64
    # cost:     x read once; no atomics, deterministic
    head, b, h, first = locate(tl.program_id(0), heads, row_blocks, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    q_stride_n = q_stride_n.to(tl.int64) * UNIT
    block = x_ptr + (b * q_stride_b + h * q_stride_h) * UNIT + first * q_stride_n
    x = load_rows(block, queries - first, q_stride_n, 0, WIDTH, D, BLOCK_M, True)
    if x_ptr.dtype.element_ty == tl.float32:
        x = x.to(tl.float64)  # a score of 100 would feel its last digits
    else:
        x = widen(x)
    length = tl.sqrt(tl.sum(x * x, axis=1).to(tl.float64))
    length = tl.where(length < LEAST_LENGTH, LEAST_LENGTH, length)
    factor = tl.cast(scale, tl.float64)
    if logit_ptr is not None:
        logit = tl.load(logit_ptr + h).to(tl.float64)
        factor *= tl.exp(tl.where(logit > LARGEST_LOGIT_SCALE, LARGEST_LOGIT_SCALE, logit))
    tl.store(out_ptr + head.to(tl.int64) * queries + rows, (factor / length).to(tl.float32), mask=rows < queries)


def cosine_factors(x: Tensor, logit_scale: Tensor | None, scale: float) -> Tensor:
    """Of q, or without ``logit_scale`` of k, ``[B, H, N, D]``: fp32 ``[B, H, N]``."""
    batch, heads, tokens, dim = x.shape
    out = x.new_empty((batch, heads, tokens), dtype=torch.float32)
    if out.numel():
        width = max(16, triton.next_power_of_2(dim))
        block = 4096 // width
        row_blocks = triton.cdiv(tokens, block)
        unit, of_x = strides(x)
        args = (x, logit_scale, out, scale, heads, tokens, row_blocks, *of_x)
        options = {"D": dim, "WIDTH": width, "UNIT": unit, "BLOCK_M": block}
        _triton.launch(cosine_factors_kernel, row_blocks * batch * heads, x, *args, **options)
    return out


class GivenScores(NamedTuple):
    """What kernels take of all that makes scores but q, k, key mask and scale."""

    tensors: tuple[Tensor | None, ...]  # bias, bias_table, bias_index, cosine_factors of q and of k
    scale: float  # of the products of q and k beside their factors
    integers: tuple[int, ...]  # strides of the bias, 0 along dims of size 1; its windows; entries of the table
    unit: int  # of these strides


def given_scores(
    op: str,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
) -> GivenScores:
    windows, entries, found = 1, 0, [0, 0, 0]
    if bias is not None:
        windows = bias.shape[0]
        found = [0 if bias.shape[dim] == 1 else bias.stride(dim) for dim in range(2)] + [bias.stride(2)]
    if bias_table is not None and bias_index is not None:
        entries = bias_table.shape[0]
        _triton.check_ids(op, "bias_index", bias_index, entries)
        bias_table, bias_index = bias_table.contiguous(), bias_index.contiguous()
    factors: tuple[Tensor | None, ...] = (None, None)
    if logit_scale is not None:
        factors = (cosine_factors(q, logit_scale.contiguous(), scale), cosine_factors(k, None, 1.0))
    unit = UNIT if bias is not None and all(stride % UNIT == 0 for stride in found) else 1
    integers = (*(stride // unit for stride in found), windows, entries)
    return GivenScores(
        (bias, bias_table, bias_index, *factors), 1.0 if logit_scale is not None else scale, integers, unit
    )


@triton.jit
def cosines(score, of_rows, of_cols, TRANSPOSED: tl.constexpr):
    # Products of q and k, times the factors of both where these are given.
    if of_rows is not None:
        score *= along(of_rows, True, TRANSPOSED) * along(of_cols, False, TRANSPOSED)
    return score


@triton.jit
def factor_of(ds, factors, dtype: tl.constexpr, QUERIES: tl.constexpr, TRANSPOSED: tl.constexpr):
    # dS as a factor of a product with q or k: times theirs, where these are given, and rounded. Of vectors that have no
    # length in fp16 they are finite, but have no room there. Other products that have none become infinite, as dS does:
    # a GradScaler has to see that.
    if factors is not None:
        factor = along(factors, QUERIES, TRANSPOSED)
        ds = ds * factor
        if dtype == tl.float16:
            clamped = tl.clamp(ds, -LARGEST_HALF, LARGEST_HALF, propagate_nan=tl.PropagateNan.ALL)
            ds = tl.where(factor > LARGEST_HALF, clamped, ds)
    return ds.to(dtype)


@triton.jit
def tangent(grad0, grad1, x0, x1, factors, D1: tl.constexpr):
    # Gradients of rows x of q or k, in two pieces, from products of dS, which take lengths for constants:
    # without what of them lies along x, unless it is too short for that.
    grad0 = grad0 * factors[:, None]
    x0 = widen(x0)
    square = tl.sum(x0 * x0, axis=1)
    radial = tl.sum(x0 * grad0, axis=1)
    if D1 > 0:
        grad1 = grad1 * factors[:, None]
        x1 = widen(x1)
        square += tl.sum(x1 * x1, axis=1)
        radial += tl.sum(x1 * grad1, axis=1)
    short = square < LEAST_LENGTH * LEAST_LENGTH
    part = tl.where(short, 0.0, radial / tl.where(short, 1.0, square))
    grad0 -= part[:, None] * x0
    if D1 > 0:
        grad1 -= part[:, None] * x1
    return grad0, grad1
