"""Triton kernel of the coefficients through which gradients of lse and of the statistics reach the scores."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _triton
from mimkernels.ops.attention.spec import DETACHED, STATISTICS
from mimkernels.ops.attention.triton_blocks import LEAST_PATCH_MASS

BLOCK = 512


@triton.jit
def captured(rows_ptr, drows_ptr, plane, count, cells, some):
    # A statistic and its upstream gradient.
    at = plane * count + cells  # int64
    return tl.load(rows_ptr + at, mask=some, other=0.0), tl.load(drows_ptr + at, mask=some, other=0.0)


@triton.jit(do_not_specialize=("count",))
def attention_coef_kernel(
    dlse_ptr,
    rows_ptr,
    drows_ptr,
    coef_ptr,
    count,
    ENTROPY: tl.constexpr,
    PREFIX_MASS: tl.constexpr,
    SELF_MASS: tl.constexpr,
    DISTANCE: tl.constexpr,
    PATCH_ENTROPY: tl.constexpr,
    PATCH_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # grid:     cdiv(B * H * Nq, BLOCK)
    # in:       dlse fp32 [B, H, Nq], statistics and their gradients fp32 [S, B, H, Nq], contiguous, dlse and drows
    #           None where not given; the constants are each statistic's plane, negative where not captured
    # out:      coef fp32 [6, B, H, Nq] as AttentionCoefParams (csrc/ops/attention/params.h) has it; written once
    # numerics: fp32
    # bounds:   the tail is masked; offsets are int64
    # cost:     inputs read once; no atomics, deterministic
    cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    some = cells < count
    count = count.to(tl.int64)
    zero = tl.zeros([BLOCK], dtype=tl.float32)
    both = zero
    if dlse_ptr is not None:
        both = tl.load(dlse_ptr + cells, mask=some, other=0.0)
    slope = zero
    c_prefix = zero
    c_patch = zero
    a_patch = zero
    own = zero
    far = zero
    if drows_ptr is not None:
        if ENTROPY >= 0:
            value, up = captured(rows_ptr, drows_ptr, ENTROPY, count, cells, some)
            slope = -up
            both -= up * value
        if PREFIX_MASS >= 0:
            value, c_prefix = captured(rows_ptr, drows_ptr, PREFIX_MASS, count, cells, some)
            both -= c_prefix * value
        if SELF_MASS >= 0:
            value, own = captured(rows_ptr, drows_ptr, SELF_MASS, count, cells, some)
            both -= own * value
        if DISTANCE >= 0:
            value, far = captured(rows_ptr, drows_ptr, DISTANCE, count, cells, some)
            both -= far * value
        if PATCH_ENTROPY >= 0:
            value, up = captured(rows_ptr, drows_ptr, PATCH_ENTROPY, count, cells, some)
            mass = tl.load(rows_ptr + PATCH_MASS * count + cells, mask=some, other=0.0)
            absent = mass < LEAST_PATCH_MASS  # false for NaN, which goes on
            safe = tl.where(absent, 1.0, mass)
            weight = tl.where(absent, 0.0, up / safe)
            a_patch = -weight
            c_patch = weight * (tl.log(safe) - value)
        if PATCH_MASS >= 0:
            value, up = captured(rows_ptr, drows_ptr, PATCH_MASS, count, cells, some)
            c_patch += up
            both -= up * value
    tl.store(coef_ptr + cells, both + c_prefix, mask=some)
    tl.store(coef_ptr + count + cells, slope, mask=some)
    tl.store(coef_ptr + 2 * count + cells, both + c_patch, mask=some)
    tl.store(coef_ptr + 3 * count + cells, slope + a_patch, mask=some)
    tl.store(coef_ptr + 4 * count + cells, own, mask=some)
    tl.store(coef_ptr + 5 * count + cells, far, mask=some)


def attention_coef(dlse: Tensor | None, rows: Tensor, drows: Tensor | None, stats: int) -> Tensor:
    coef = rows.new_empty((6, *rows.shape[1:]))
    if coef.numel() == 0:
        return coef
    captured = [name for bit, name in enumerate(STATISTICS) if stats >> bit & 1]
    differentiable = [name for name in STATISTICS if name not in DETACHED]
    planes = {name.upper(): captured.index(name) if name in captured else -1 for name in differentiable}
    given = [None if x is None else x.contiguous() for x in (dlse, rows, drows)]
    count = coef[0].numel()
    grid = triton.cdiv(count, BLOCK)
    _triton.launch(attention_coef_kernel, grid, rows, *given, coef, count, **planes, BLOCK=BLOCK)
    return coef
