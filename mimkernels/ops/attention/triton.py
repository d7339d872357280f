"""Triton kernels of attention: the forward pass with its row statistics, and how they are launched."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _triton
from mimkernels.ops.attention import triton_configs
from mimkernels.ops.attention.reference import with_prefix_rows
from mimkernels.ops.attention.spec import new_gradients
from mimkernels.ops.attention.triton_bias_grad import attention_dbias_kernel, table_gradient
from mimkernels.ops.attention.triton_blocks import (
    INTEGERS,
    LN2,
    LOG2E,
    added_bias,
    architecture,
    distance_block,
    dot_precision,
    head_bias,
    head_split,
    load_point,
    load_row,
    load_rows,
    masked_keys,
    position_strides,
    power,
    precision_name,
    store_rows,
    strides,
)
from mimkernels.ops.attention.triton_bwd import attention_bwd_kernel, attention_dkv_kernel, attention_dq_kernel
from mimkernels.ops.attention.triton_coef import attention_coef as attention_coef
from mimkernels.ops.attention.triton_cosine import LARGEST_LOGIT_SCALE, cosines, given_scores
from mimkernels.ops.attention.triton_statistics import (
    ARGMAX,
    DISTANCE,
    ENTROPY,
    EXPECTING,
    OF_MAXIMUM,
    SELF_MASS,
    SPLITTING,
    asked,
    store_statistics,
)


@triton.jit
def attend_block(
    acc0,
    acc1,
    level,
    mass,
    mass_prefix,
    energy,
    energy_prefix,
    far,
    own,
    at_top,
    q0,
    q1,
    rows,
    x0,
    x1,
    x2,
    k_head,
    v_head,
    of_rows,
    k_factor_row,
    bias,
    inside,
    mask_row,
    pos_image,
    start,
    keys,
    num_prefix,
    scale,
    factor,
    k_stride_n,
    v_stride_n,
    pos_stride_n,
    STATS: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    FOLD: tl.constexpr,
    EXACT: tl.constexpr,
    FIRST: tl.constexpr,
    CHECK: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # One step of the online softmax over BLOCK_N keys from `start`. level is the running maximum of the scores, which
    # FOLD leaves unscaled; all sums are relative to it: mass of p = 2 ** t, energy of p * t, far of p * distance, with
    # t = (score - level) * factor. Sums are of patch keys where a statistic tells them from prefix keys, else of all;
    # own is the score of the query's own key, at_top the first key whose score is level. FIRST: nothing was summed
    # before. CHECK: the block may hold prefix keys, the queries' own keys or keys beyond the last. EXACT: p = e ** t,
    # with rounding as in plain fp32.
    SPLIT: tl.constexpr = HAS_PREFIX and CHECK and asked(STATS, SPLITTING)
    cols = start + tl.arange(0, BLOCK_N)
    k_block = k_head + start * k_stride_n
    v_block = v_head + start * v_stride_n
    left = keys - start
    k0 = load_rows(k_block, left, k_stride_n, 0, D0, D, BLOCK_N, CHECK)
    score = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)  # [M, N]
    if D1 > 0:
        k1 = load_rows(k_block, left, k_stride_n, D0, D1, D, BLOCK_N, CHECK)
        score = tl.dot(q1, tl.trans(k1), score, input_precision=PRECISION)
    v0 = load_rows(v_block, left, v_stride_n, 0, D0, D, BLOCK_N, CHECK)
    if k_factor_row is not None:
        score = cosines(score, of_rows, load_row(k_factor_row, cols, cols < keys), False)
    if not FOLD:
        score = score * scale
        if (bias[0] is not None) or (bias[1] is not None):
            score += added_bias(bias, inside, cols, (cols < keys)[None, :], keys, False, CHECK)
    if CHECK or mask_row is not None:
        score = masked_keys(score, mask_row, cols, keys, CHECK)
    if asked(STATS, SELF_MASS) and CHECK:
        own += tl.sum(tl.where(rows[:, None] == cols[None, :], score, 0.0), axis=1)
    top = tl.max(score, axis=1)
    if asked(STATS, ARGMAX):
        # Blocks do not come in order.
        here = tl.min(tl.where(score == top[:, None], cols[None, :], keys), axis=1)
        at_top = tl.where(top > level, here, tl.where(top == level, tl.minimum(at_top, here), at_top))
    if FIRST:
        new_level = top
    else:
        new_level = tl.maximum(level, top)
    base = tl.where(new_level == float("-inf"), 0.0, new_level)
    t = (score - base[:, None]) * factor
    if asked(STATS, EXPECTING):
        # A masked key's t is -inf; its product with p = 0 must be 0.
        t = tl.maximum(t, -1000.0, propagate_nan=tl.PropagateNan.ALL)
    p = power(t, EXACT)
    if not FIRST:
        shift = tl.maximum((level - base) * factor, -1000.0)
        shrink = power(shift, EXACT)
        if asked(STATS, EXPECTING):
            energy = (energy + mass * shift) * shrink
            if HAS_PREFIX and asked(STATS, SPLITTING):
                energy_prefix = (energy_prefix + mass_prefix * shift) * shrink
        if HAS_PREFIX and asked(STATS, SPLITTING):
            mass_prefix = mass_prefix * shrink
        mass = mass * shrink
        far = far * shrink
        acc0 = acc0 * shrink[:, None]
        if D1 > 0:
            acc1 = acc1 * shrink[:, None]
    if SPLIT:
        in_patch = (cols >= num_prefix)[None, :]
        mass += tl.sum(tl.where(in_patch, p, 0.0), axis=1)
        mass_prefix += tl.sum(tl.where(in_patch, 0.0, p), axis=1)
        if asked(STATS, EXPECTING):
            energy += tl.sum(tl.where(in_patch, p * t, 0.0), axis=1)
            if asked(STATS, ENTROPY):
                energy_prefix += tl.sum(tl.where(in_patch, 0.0, p * t), axis=1)
    else:
        mass += tl.sum(p, axis=1)
        if asked(STATS, EXPECTING):
            energy += tl.sum(p * t, axis=1)
    if asked(STATS, DISTANCE):
        # Adding what comes from the scores (0; NaN in a row of NaN) has the distances made in the layout of p.
        zero = base * 0.0
        d = distance_block(x0 + zero, x1 + zero, x2 + zero, pos_image, cols, keys, pos_stride_n, DIMS)
        if HAS_PREFIX and CHECK:
            d = tl.where((cols >= num_prefix)[None, :], d, 0.0)
        far += tl.sum(p * d, axis=1)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0, input_precision=PRECISION)
    if D1 > 0:
        v1 = load_rows(v_block, left, v_stride_n, D0, D1, D, BLOCK_N, CHECK)
        acc1 = tl.dot(p, v1, acc1, input_precision=PRECISION)
    return acc0, acc1, new_level, mass, mass_prefix, energy, energy_prefix, far, own, at_top


@triton.jit(do_not_specialize=INTEGERS)
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    table_ptr,
    index_ptr,
    q_factor_ptr,
    k_factor_ptr,
    mask_ptr,
    pos_ptr,
    out_ptr,
    lse_ptr,
    low_ptr,
    rows_ptr,
    scale,
    factor,
    heads,
    queries,
    keys,
    num_prefix,
    row_blocks,
    plane,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    bias_stride_b,
    bias_stride_h,
    bias_stride_n,
    windows,
    entries,
    mask_stride_b,
    pos_stride_b,
    pos_stride_n,
    STATS: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    FOLD: tl.constexpr,
    EXACT: tl.constexpr,
    ONE_PASS: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DIMS: tl.constexpr,
    UNIT: tl.constexpr,
    BIAS_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # grid:     cdiv(Nq, BLOCK_M) * B * H, row blocks fastest; a program owns BLOCK_M queries of one head and sees all
    #           keys
    # in:       q [B, H, Nq, D], k, v [B, H, Nk, D] by stride in units of UNIT elements, last stride 1; bias [W, H,
    #           Nq, Nk] by stride (0 where broadcast), table [T, H] and index [Nq, Nk], key mask [B, Nk], positions
    #           fp32 [B, N, DIMS], each or None
    # out:      out [B, Nq, H, D], lse and lse_low fp32 [B, H, Nq], rows fp32 [S, B, H, Nq] in the order of the bits
    #           of STATS; contiguous, every element written once
    # numerics: scores, maxima and sums in fp32; p = 2 ** ((score - maximum) * factor), rounded to the dtype of v,
    #           with log2(e) folded into factor; EXACT: e ** (...), for fp32. FOLD: no bias and a positive scale,
    #           which then is in factor. Statistics come from sums relative to the row's maximum, so that large scores
    #           do not cancel
    # bounds:   keys beyond the last and masked keys have score -inf; query tails are masked; offsets are int64
    # cost:     q read once, k and v cdiv(Nq, BLOCK_M) times; ONE_PASS: all keys in one block, nothing is rescaled;
    #           statistics not in STATS leave no instruction; no atomics, deterministic
    pid = tl.program_id(0)
    head = pid // row_blocks
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    first = pid % row_blocks * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    some = rows < queries
    q_head = q_ptr + (b * q_stride_b + h * q_stride_h) * UNIT
    k_head = k_ptr + (b * k_stride_b + h * k_stride_h) * UNIT
    v_head = v_ptr + (b * v_stride_b + h * v_stride_h) * UNIT
    q_stride_n = q_stride_n.to(tl.int64) * UNIT
    k_stride_n = k_stride_n.to(tl.int64) * UNIT
    v_stride_n = v_stride_n.to(tl.int64) * UNIT
    q_block = q_head + first * q_stride_n
    # Rows beyond the last read the last one's bias and position.
    inside = tl.minimum(rows, queries - 1).to(tl.int64)
    of_rows = None
    k_factor_row = None
    if q_factor_ptr is not None:
        of_rows = load_row(q_factor_ptr, head.to(tl.int64) * queries + rows, some)
        k_factor_row = k_factor_ptr + head.to(tl.int64) * keys
    bias = head_bias(
        bias_ptr, table_ptr, index_ptr, b, h, heads, windows, entries,
        bias_stride_b, bias_stride_h, bias_stride_n, BIAS_UNIT,
    )  # fmt: skip
    mask_row = None
    if mask_ptr is not None:
        mask_row = mask_ptr + b * mask_stride_b
    pos_image = None
    x0 = 0.0
    x1 = 0.0
    x2 = 0.0
    if asked(STATS, DISTANCE):
        pos_image = pos_ptr + b * pos_stride_b
        x0, x1, x2 = load_point(pos_image + inside * pos_stride_n, DIMS)
    q0 = load_rows(q_block, queries - first, q_stride_n, 0, D0, D, BLOCK_M, True)
    q1 = q0
    if D1 > 0:
        q1 = load_rows(q_block, queries - first, q_stride_n, D0, D1, D, BLOCK_M, True)
    acc0 = tl.zeros([BLOCK_M, D0], dtype=tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 16], dtype=tl.float32)
    level = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    mass = tl.zeros([BLOCK_M], dtype=tl.float32)
    mass_prefix = mass
    energy = mass
    energy_prefix = mass
    far = mass
    own = mass
    at_top = tl.full([BLOCK_M], 2147483647, dtype=tl.int32)
    if ONE_PASS:
        acc0, acc1, level, mass, mass_prefix, energy, energy_prefix, far, own, at_top = attend_block(
            acc0, acc1, level, mass, mass_prefix, energy, energy_prefix, far, own, at_top,
            q0, q1, rows, x0, x1, x2, k_head, v_head, of_rows, k_factor_row, bias, inside, mask_row, pos_image,
            0, keys, num_prefix, scale, factor, k_stride_n, v_stride_n, pos_stride_n,
            STATS, HAS_PREFIX, FOLD, EXACT, True, True, D, D0, D1, BLOCK_N, DIMS, PRECISION,
        )  # fmt: skip
    else:
        # Blocks that need no check come first; then those with prefix keys or the queries' own keys, where a statistic
        # sets these apart, and the tail.
        blocks = tl.cdiv(keys, BLOCK_N)
        special = 0
        if HAS_PREFIX and (asked(STATS, SPLITTING) or asked(STATS, DISTANCE)):
            special = tl.cdiv(num_prefix, BLOCK_N)
        tail = tl.maximum(keys // BLOCK_N, special)
        own_first = tail
        own_blocks = 0
        if asked(STATS, SELF_MASS):
            own_first = tl.minimum(tl.maximum(first // BLOCK_N, special), tail)
            own_blocks = tl.minimum(tl.maximum(tl.cdiv(first + BLOCK_M, BLOCK_N), special), tail) - own_first
        for i in tl.range(special, tail - own_blocks):
            block = i + tl.where(i >= own_first, own_blocks, 0)
            acc0, acc1, level, mass, mass_prefix, energy, energy_prefix, far, own, at_top = attend_block(
                acc0, acc1, level, mass, mass_prefix, energy, energy_prefix, far, own, at_top,
                q0, q1, rows, x0, x1, x2, k_head, v_head, of_rows, k_factor_row, bias, inside, mask_row, pos_image,
                block * BLOCK_N, keys, num_prefix, scale, factor, k_stride_n, v_stride_n, pos_stride_n,
                STATS, HAS_PREFIX, FOLD, EXACT, False, False, D, D0, D1, BLOCK_N, DIMS, PRECISION,
            )  # fmt: skip
        for i in tl.range(0, special + own_blocks + blocks - tail, num_stages=1):
            block = tl.where(i < special, i, tl.where(i < special + own_blocks, own_first + i - special, blocks - 1))
            acc0, acc1, level, mass, mass_prefix, energy, energy_prefix, far, own, at_top = attend_block(
                acc0, acc1, level, mass, mass_prefix, energy, energy_prefix, far, own, at_top,
                q0, q1, rows, x0, x1, x2, k_head, v_head, of_rows, k_factor_row, bias, inside, mask_row, pos_image,
                block * BLOCK_N, keys, num_prefix, scale, factor, k_stride_n, v_stride_n, pos_stride_n,
                STATS, HAS_PREFIX, FOLD, EXACT, False, True, D, D0, D1, BLOCK_N, DIMS, PRECISION,
            )  # fmt: skip

    total = mass
    if HAS_PREFIX and asked(STATS, SPLITTING):
        total = mass + mass_prefix
    # A row that may attend nothing has total 0; any other at least 1, from its maximum.
    empty = total == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / total)
    place = head.to(tl.int64) * queries + rows
    log_total = tl.log2(total) * LN2
    # The backward pass scales products before it subtracts lse, in one rounding, and so does lse_low.
    unit_score = scale if FOLD else 1.0
    lse = tl.fma(level, unit_score, log_total)
    lse = tl.where(level == float("inf"), level, lse)
    low = tl.where(tl.abs(lse) < float("inf"), tl.fma(level, unit_score, -lse) + log_total, 0.0)
    tl.store(lse_ptr + place, lse, mask=some)
    tl.store(low_ptr + place, low, mask=some)
    out_stride_n = heads.to(tl.int64) * D
    out_block = out_ptr + (b * queries + first) * out_stride_n + h * D
    store_rows(out_block, acc0 * inverse[:, None], queries - first, out_stride_n, 0, D0, D, BLOCK_M)
    if D1 > 0:
        store_rows(out_block, acc1 * inverse[:, None], queries - first, out_stride_n, D0, D1, D, BLOCK_M)

    store_statistics(
        rows_ptr + place, plane, rows, some, num_prefix, factor, unit_score, level, total, log_total, inverse,
        mass, mass_prefix, energy, energy_prefix, far, own, at_top, STATS, HAS_PREFIX, EXACT, BLOCK_M,
    )  # fmt: skip


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    key_mask: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
    num_prefix: int,
    positions: Tensor | None,
    stats: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    out = q.new_empty((batch, queries, heads, dim))
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    low = torch.empty_like(lse)
    rows = q.new_empty((stats.bit_count(), batch, heads, queries), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse, low, rows
    if positions is not None:
        positions = with_prefix_rows(positions, num_prefix, keys)
    d0, d1 = head_split(dim, q.dtype)
    kernel = "forward" if bias is None and bias_table is None and key_mask is None else "masked"
    config = triton_configs.committed(
        kernel, architecture(q.device), precision_name(q.dtype), d0 + d1, keys, stats & ~OF_MAXIMUM.value > 0
    )
    if bias_table is not None:
        config = triton_configs.beside_table(config, d0 + d1)
    row_blocks = triton.cdiv(queries, config.block_m)
    unit, qkv_strides = strides(q, k, v)
    scored = given_scores("attention", q, k, bias, bias_table, bias_index, logit_scale, scale)
    scale = scored.scale
    precision = dot_precision(q.dtype)
    exact = q.dtype == torch.float32 and precision == "ieee"
    fold = bias is None and bias_table is None and scale > 0
    _triton.launch(
        attention_fwd_kernel,
        row_blocks * batch * heads,
        q,
        *(q, k, v, *scored.tensors, key_mask, positions, out, lse, low, rows),
        *(scale, (scale if fold else 1.0) * (1.0 if exact else LOG2E.value)),
        *(heads, queries, keys, num_prefix, row_blocks, lse.numel()),
        *(*qkv_strides, *scored.integers, *position_strides(key_mask, positions)),
        STATS=stats,
        HAS_PREFIX=num_prefix > 0,
        FOLD=fold,
        EXACT=exact,
        ONE_PASS=keys <= config.block_n,
        D=dim,
        D0=d0,
        D1=d1,
        DIMS=0 if positions is None else positions.shape[2],
        UNIT=unit,
        BIAS_UNIT=scored.unit,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out, lse, low, rows


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    bias: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    key_mask: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
    num_prefix: int,
    positions: Tensor | None,
    coef: Tensor | None,
    need_bias: bool,
    need_table: bool,
    need_logit_scale: bool,
    packed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    made = new_gradients(q, k, packed)
    dq, dk, dv = made[0].unbind(2) if packed else made
    grad_heads = 3 * heads if packed else heads  # between a token of the gradients and the next
    dbias = bias.new_empty(bias.shape) if bias is not None and need_bias else q.new_empty((0,))
    if positions is not None:
        positions = with_prefix_rows(positions, num_prefix, keys)
    d0, d1 = head_split(dim, q.dtype, backward=True)
    target = (architecture(q.device), precision_name(q.dtype), d0 + d1, queries, coef is not None)
    dq_config, dkv_config = (triton_configs.committed(kernel, *target) for kernel in ("dq", "dkv"))
    unit, qkvg_strides = strides(q, k, v, dout)
    scored = given_scores("attention", q, k, bias, bias_table, bias_index, logit_scale, scale)
    scale = scored.scale
    table = bias_table if need_table else None
    # The gradient of an fp32 bias or table is more exact than a 16-bit output lets delta be.
    refined = (bias if need_bias else None, table)
    refine = logit_scale is not None or any(added is not None and added.dtype != q.dtype for added in refined)
    # Programs of the dQ kernel write the gradient of a bias that nothing shares, with the delta that they begin with;
    # another kernel sums a shared one.
    full_bias = bias is not None and need_bias and not refine and bias.shape[:2] == (batch, heads)
    # The factors of cosines would carry the rounding of a 16-bit out into dq: delta is summed first.
    twice = logit_scale is not None and q.dtype != torch.float32
    fused = None if full_bias or twice else triton_configs.config("fused", *target)
    if bias_table is not None:
        dq_config, dkv_config = (triton_configs.beside_table(config, d0 + d1) for config in (dq_config, dkv_config))
        fused = None if fused is None else triton_configs.beside_table(fused, d0 + d1)
    delta = torch.empty_like(lse) if fused is None or need_bias or need_table or need_logit_scale else None
    given = (coef, *scored.tensors, key_mask, positions)
    precision = dot_precision(q.dtype)
    exact = q.dtype == torch.float32 and precision == "ieee"
    sizes = (scale, heads, queries, keys, num_prefix)
    options = {
        "HAS_PREFIX": num_prefix > 0 and coef is not None,
        "D": dim,
        "D0": d0,
        "D1": d1,
        "DIMS": 0 if positions is None or coef is None else positions.shape[2],
        "UNIT": unit,
        "BIAS_UNIT": scored.unit,
        "PRECISION": precision,
        "EXACT": exact,
        "REFINE": refine,
    }
    all_strides = (*qkvg_strides, *scored.integers, *position_strides(key_mask, positions))
    plane = lse.numel()

    def run(
        kernel: Any,
        programs: int,
        tensors: tuple[Tensor | None, ...],
        blocks: tuple[int, ...],
        config: triton_configs.Config,
        **more: bool,
    ) -> None:
        if programs:
            _triton.launch(
                kernel,
                programs,
                q,
                *(*tensors, *sizes, *blocks, plane, *all_strides),
                **options,
                **more,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                num_warps=config.warps,
                num_stages=config.stages,
            )

    if fused is not None:
        tensors: tuple[Tensor | None, ...] = (q, k, v, dout, out, lse, lse_low, *given, delta, dq, dk, dv)
        run(attention_bwd_kernel, batch * heads, tensors, (grad_heads,), fused)
    else:
        row_blocks = triton.cdiv(queries, dq_config.block_m)
        tensors = (q, k, v, dout, out, lse, lse_low, *given, delta, dq, dbias if full_bias else None)
        for has_delta in (False, True) if twice else (False,):
            blocks = (row_blocks, grad_heads)
            run(attention_dq_kernel, row_blocks * batch * heads, tensors, blocks, dq_config, HAS_DELTA=has_delta)
        key_blocks = triton.cdiv(keys, dkv_config.block_n)
        tensors = (q, k, v, dout, lse, lse_low, delta, *given, dk, dv)
        run(attention_dkv_kernel, key_blocks * batch * heads, tensors, (key_blocks, grad_heads), dkv_config)
    row_blocks, key_blocks = triton.cdiv(queries, dq_config.block_m), triton.cdiv(keys, dq_config.block_n)

    by_head = (1, heads)
    owners = row_blocks * key_blocks * heads
    groups, _ = _triton.batch_groups(max(1, batch), owners)
    products = lse.new_empty((groups, heads, row_blocks * key_blocks)) if need_logit_scale else None

    def sum_score_gradients(windows: int, kept_heads: int, like: Tensor | None) -> Tensor:
        """Sums over the images and heads that share a bias [windows, kept_heads, Nq, Nk], in the dtype of ``like``; of
        each head of all images the products, too."""
        owners = row_blocks * key_blocks * windows * kept_heads
        groups, per_group = _triton.batch_groups(max(1, batch // max(1, windows)), owners)
        partial, summed = None, lse.new_empty((0,))
        if like is not None:
            partial, summed = _triton.partials(groups, (windows, kept_heads, queries, keys), like)
        product = products if (windows, kept_heads) == by_head else None
        tensors = (q, k, v, dout, lse, lse_low, delta, *given, partial, product)
        blocks = (row_blocks, key_blocks, batch, per_group, windows, kept_heads)
        run(attention_dbias_kernel, owners * groups, tensors, blocks, dq_config)
        return _triton.sum_partials(partial, summed) if owners else summed

    summed_by_head = table is not None
    if bias is not None and need_bias and not full_bias:
        dbias = sum_score_gradients(bias.shape[0], bias.shape[1], bias)
        summed_by_head = summed_by_head or bias.shape[:2] == by_head
    dtable = q.new_empty((0,))
    if table is not None and bias_index is not None:
        dtable = table_gradient(sum_score_gradients(1, heads, lse), bias_index, table)
    dlogit_scale = lse.new_empty((0,))
    if logit_scale is not None and products is not None:
        if not summed_by_head:
            sum_score_gradients(1, heads, None)
        # At its largest the scale is a constant.
        dlogit_scale = torch.where(logit_scale > LARGEST_LOGIT_SCALE.value, 0.0, products.sum((0, 2)))
    return *made, dbias, dtable, dlogit_scale
