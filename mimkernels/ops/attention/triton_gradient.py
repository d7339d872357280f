"""The Triton device function that backward kernels of attention have in common: P and dS of a tile of scores."""

from __future__ import annotations

import triton
import triton.language as tl

from mimkernels.ops.attention.triton_blocks import LN2, along, exponents, load_point, load_row, power
from mimkernels.ops.attention.triton_cosine import cosines


@triton.jit
def load_coefficients(coef_ptr, place, plane, some, is_patch, unit, HAS_PREFIX: tl.constexpr, DIMS: tl.constexpr):
    # (c_prefix, a_prefix, c_patch, a_patch, own, far) of some queries, as slopes on t = (S - lse - lse_low) / unit. far
    # is 0 for prefix queries.
    plane = plane.to(tl.int64)
    c_patch = load_row(coef_ptr, place + 2 * plane, some)
    a_patch = load_row(coef_ptr, place + 3 * plane, some) * unit
    c_prefix = c_patch
    a_prefix = a_patch
    if HAS_PREFIX:
        c_prefix = load_row(coef_ptr, place, some)
        a_prefix = load_row(coef_ptr, place + plane, some) * unit
    own = load_row(coef_ptr, place + 4 * plane, some)
    far = own
    if DIMS > 0:
        far = load_row(coef_ptr, place + 5 * plane, some & is_patch)
    return c_prefix, a_prefix, c_patch, a_patch, own, far


@triton.jit
def key_distances(x0, x1, x2, y0, y1, y2, cols, num_prefix, TRANSPOSED: tl.constexpr, DIMS: tl.constexpr):
    # Distances between the queries' points x and the keys' points y, 0 on prefix keys.
    difference = along(x0, True, TRANSPOSED) - along(y0, False, TRANSPOSED)
    square = difference * difference
    if DIMS > 1:
        difference = along(x1, True, TRANSPOSED) - along(y1, False, TRANSPOSED)
        square += difference * difference
    if DIMS > 2:
        difference = along(x2, True, TRANSPOSED) - along(y2, False, TRANSPOSED)
        square += difference * difference
    return tl.where(along(cols >= num_prefix, False, TRANSPOSED), tl.sqrt(square), 0.0)


@triton.jit
def score_gradient(
    q0,
    q1,
    k0,
    k1,
    v0,
    v1,
    g0,
    g1,
    rows,
    cols,
    lse,
    low,
    delta,
    some,
    place,
    plane,
    coef_ptr,
    of_rows,
    of_cols,
    bias,
    mask_row,
    pos_image,
    queries,
    keys,
    num_prefix,
    scale,
    pos_stride_n,
    HAS_PREFIX: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CHECK: tl.constexpr,
    D1: tl.constexpr,
    DIMS: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    # (P, dS, P (dP - delta), products of q and k or cosines), fp32 [queries, keys], or the transposes [keys, queries].
    # CHECK: keys may lie beyond the last; their P is 0. of_rows, of_cols: the factors of cosine attention, or None.
    # EXACT: exponents are of base e, else of base 2.
    if TRANSPOSED:
        score = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)
        if D1 > 0:
            score = tl.dot(k1, tl.trans(q1), score, input_precision=PRECISION)
        dp = tl.dot(v0, tl.trans(g0), input_precision=PRECISION)
        if D1 > 0:
            dp = tl.dot(v1, tl.trans(g1), dp, input_precision=PRECISION)
    else:
        score = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if D1 > 0:
            score = tl.dot(q1, tl.trans(k1), score, input_precision=PRECISION)
        dp = tl.dot(g0, tl.trans(v0), input_precision=PRECISION)
        if D1 > 0:
            dp = tl.dot(g1, tl.trans(v1), dp, input_precision=PRECISION)
    score = cosines(score, of_rows, of_cols, TRANSPOSED)
    t = exponents(score, rows, cols, lse, low, bias, mask_row, queries, keys, scale, TRANSPOSED, CHECK, EXACT)
    # Coefficients are added to what is left of dp, which rounds less than dp or delta themselves.
    dp -= along(delta, True, TRANSPOSED)
    if coef_ptr is None:
        p = power(t, EXACT)
        of_out = p * dp
        ds = of_out
    else:
        # A masked key's t is -inf; its product with p = 0 must be 0.
        t = tl.maximum(t, -1000.0, propagate_nan=tl.PropagateNan.ALL)
        p = power(t, EXACT)
        c_prefix, a_prefix, c_patch, a_patch, own, far = load_coefficients(
            coef_ptr, place, plane, some, rows >= num_prefix, 1.0 if EXACT else LN2, HAS_PREFIX, DIMS
        )
        c = along(c_patch, True, TRANSPOSED)
        a = along(a_patch, True, TRANSPOSED)
        if HAS_PREFIX:
            in_prefix = along(cols < num_prefix, False, TRANSPOSED)
            c = tl.where(in_prefix, along(c_prefix, True, TRANSPOSED), c)
            a = tl.where(in_prefix, along(a_prefix, True, TRANSPOSED), a)
        inner = dp + (c + a * t)
        is_own = along(rows, True, TRANSPOSED) == along(cols, False, TRANSPOSED)
        inner += tl.where(is_own, along(own, True, TRANSPOSED), 0.0)
        if DIMS > 0:
            inside = tl.minimum(rows, queries - 1).to(tl.int64)
            x0, x1, x2 = load_point(pos_image + inside * pos_stride_n, DIMS)
            inside = tl.minimum(cols, keys - 1).to(tl.int64)
            y0, y1, y2 = load_point(pos_image + inside * pos_stride_n, DIMS)
            d = key_distances(x0, x1, x2, y0, y1, y2, cols, num_prefix, TRANSPOSED, DIMS)
            inner += along(far, True, TRANSPOSED) * d
        ds = p * inner
        of_out = p * dp
    return p, ds, of_out, score
