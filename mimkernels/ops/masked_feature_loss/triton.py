"""Triton kernels of masked_feature_loss."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _triton
from mimkernels.ops._triton import narrow, widen

MSE, L1, SMOOTH_L1, COSINE = (tl.constexpr(kind) for kind in range(4))
LEAST_SQUARE = tl.constexpr(1e-16)  # of the length of a vector whose cosine is taken
# Features of a row that a program has in registers at a time.
MAX_BLOCK = 2048
# The mean over rows, MEAN_BLOCK at a time: one program up to MEAN_ROWS of them, at most MEAN_PROGRAMS and a second
# launch above.
MEAN_BLOCK, MEAN_ROWS, MEAN_PROGRAMS = 1024, 8192, 64


@triton.jit
def find_target(target_ptr, ids_ptr, a, j, images, tokens, stride_b, stride_n, ids_stride, FLAT: tl.constexpr):
    # The row of target that row j of pred's image a is compared with, and whether its id names one.
    image, token = a, j.to(tl.int64)
    known = token >= 0
    if ids_ptr is not None:
        token = tl.load(ids_ptr + a * ids_stride + j)
        if FLAT:
            known = (token >= 0) & (token < images.to(tl.int64) * tokens)
            image = tl.where(known, token, 0) // tokens
            token = token - image * tokens
        else:
            known = (token >= 0) & (token < tokens)
    token = tl.where(known, token, 0)
    return target_ptr + image * stride_b + token * stride_n, known


@triton.jit
def load_row(row_ptr, first, DIM: tl.constexpr, BLOCK: tl.constexpr):
    # Features [first, first + BLOCK) of a row in fp32, 0 past its end, and which there are.
    columns = first + tl.arange(0, BLOCK)
    inside = columns < DIM
    return widen(tl.load(row_ptr + columns, mask=inside, other=0.0)), inside


@triton.jit
def row_statistics(row_ptr, eps, LAYER_NORM: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    # Mean and 1 / sqrt(variance + eps) of a row; the mean is corrected by that of the deviations from it.
    mean = 0.0
    rstd = 1.0
    if LAYER_NORM:
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(0, DIM, BLOCK):
            total += load_row(row_ptr, first, DIM, BLOCK)[0]
        mean = tl.sum(total, axis=0) / DIM
        total = tl.zeros([BLOCK], dtype=tl.float32)
        squares = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(0, DIM, BLOCK):
            value, inside = load_row(row_ptr, first, DIM, BLOCK)
            deviation = tl.where(inside, value - mean, 0.0)
            total += deviation
            squares += deviation * deviation
        rest = tl.sum(total, axis=0) / DIM
        variance = tl.sum(squares, axis=0) / DIM - rest * rest
        mean += rest
        rstd = 1.0 / tl.sqrt_rn(tl.where(variance < 0.0, 0.0, variance) + eps)
    return mean, rstd


@triton.jit
def load_pair(pred_ptr, target_ptr, first, mean, rstd, DIM: tl.constexpr, BLOCK: tl.constexpr):
    # Predictions and normalised targets, both 0 past the row's end, and which there are.
    pred, inside = load_row(pred_ptr, first, DIM, BLOCK)
    target = load_row(target_ptr, first, DIM, BLOCK)[0]
    return pred, tl.where(inside, (target - mean) * rstd, 0.0), inside


@triton.jit
def row_products(pred_ptr, target_ptr, mean, rstd, DIM: tl.constexpr, BLOCK: tl.constexpr):
    # Sums of pred * pred, target * target and pred * target.
    pp = tl.zeros([BLOCK], dtype=tl.float32)
    tt = tl.zeros([BLOCK], dtype=tl.float32)
    pt = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, DIM, BLOCK):
        pred, target, _ = load_pair(pred_ptr, target_ptr, first, mean, rstd, DIM, BLOCK)
        pp += pred * pred
        tt += target * target
        pt += pred * target
    return tl.sum(pp, axis=0), tl.sum(tt, axis=0), tl.sum(pt, axis=0)


@triton.jit
def inverse_length(square):
    # 1 over the length of a vector, by its square.
    return 1.0 / tl.sqrt_rn(tl.where(square < LEAST_SQUARE, LEAST_SQUARE, square))


@triton.jit(do_not_specialize=_triton.SIZES)
def masked_feature_loss_fwd_kernel(
    pred_ptr,
    target_ptr,
    ids_ptr,
    loss_ptr,
    rows,
    images,
    tokens,
    pred_stride_a,
    pred_stride_r,
    target_stride_b,
    target_stride_n,
    ids_stride,
    eps,
    beta,
    FLAT: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    KIND: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # grid:     A * R; a program owns one row of pred
    # in:       pred [A, R, D], target [B, N, D] and ids int64 [A, R] or None, by stride, last stride 1; D padded to
    #           the block, or read in blocks
    # out:      loss fp32 [A, R] contiguous, 0 where the id names no token; every element written once
    # numerics: fp32; variance about the mean in a second pass; sums by a tree
    # bounds:   the tail of the row is masked; offsets are int64
    # cost:     rows of pred read once from memory, named rows of target too: again from the first-level cache
    pid = tl.program_id(0)
    a = (pid // rows).to(tl.int64)
    j = pid % rows
    place = (target_ptr, ids_ptr, a, j, images, tokens, target_stride_b, target_stride_n, ids_stride)
    target_row, known = find_target(*place, FLAT)
    loss = tl.full([], 0.0, tl.float32)
    if known:
        pred_row = pred_ptr + a * pred_stride_a + j.to(tl.int64) * pred_stride_r
        mean, rstd = row_statistics(target_row, eps, LAYER_NORM, DIM, BLOCK)
        if KIND == COSINE:
            pp, tt, pt = row_products(pred_row, target_row, mean, rstd, DIM, BLOCK)
            loss = 1.0 - pt * inverse_length(pp) * inverse_length(tt)
        else:
            total = tl.zeros([BLOCK], dtype=tl.float32)
            for first in range(0, DIM, BLOCK):
                pred, target, _ = load_pair(pred_row, target_row, first, mean, rstd, DIM, BLOCK)
                size = tl.abs(pred - target)
                if KIND == MSE:
                    total += size * size
                elif KIND == L1:
                    total += size
                else:
                    least = tl.where(size < beta, size, beta)
                    total += least * (size - 0.5 * least)
            loss = tl.sum(total, axis=0)
            if KIND == SMOOTH_L1:
                loss = loss / beta
            loss = loss / DIM
    tl.store(loss_ptr + pid, loss)


@triton.jit(do_not_specialize=("count", *_triton.SIZES))
def masked_feature_loss_bwd_kernel(
    grad_ptr,
    pred_ptr,
    target_ptr,
    ids_ptr,
    dpred_ptr,
    count,
    rows,
    images,
    tokens,
    grad_stride_a,
    grad_stride_r,
    pred_stride_a,
    pred_stride_r,
    target_stride_b,
    target_stride_n,
    ids_stride,
    eps,
    beta,
    FLAT: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    KIND: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # grid:     A * R; a program owns one row of dpred
    # in:       as in the forward; grad fp32, one number or [A, R] by stride; count, the rows that a mean was taken over
    # out:      dpred [A, R, D] contiguous, 0 where the id names no token; every element written once
    # numerics: fp32, rounded once; targets as in the forward
    # bounds:   as in the forward
    # cost:     as in the forward, and dpred written once
    pid = tl.program_id(0)
    a = (pid // rows).to(tl.int64)
    j = pid % rows
    place = (target_ptr, ids_ptr, a, j, images, tokens, target_stride_b, target_stride_n, ids_stride)
    target_row, known = find_target(*place, FLAT)
    pred_row = pred_ptr + a * pred_stride_a + j.to(tl.int64) * pred_stride_r
    dpred_row = dpred_ptr + pid.to(tl.int64) * DIM
    if known:
        grad = tl.load(grad_ptr + a * grad_stride_a + j.to(tl.int64) * grad_stride_r) / count
        mean, rstd = row_statistics(target_row, eps, LAYER_NORM, DIM, BLOCK)
        if KIND == COSINE:
            pp, tt, pt = row_products(pred_row, target_row, mean, rstd, DIM, BLOCK)
            inverse = inverse_length(pp)
            across = inverse * inverse_length(tt)
            along = tl.where(pp < LEAST_SQUARE, 0.0, pt * across * inverse * inverse)  # a clamped length is a constant
        else:
            grad = grad / DIM
            if KIND == SMOOTH_L1:
                grad = grad / beta
        for first in range(0, DIM, BLOCK):
            pred, target, inside = load_pair(pred_row, target_row, first, mean, rstd, DIM, BLOCK)
            if KIND == COSINE:
                value = pred * (grad * along) - target * (grad * across)
            else:
                d = pred - target
                if KIND == MSE:
                    value = 2.0 * d * grad
                elif KIND == L1:  # NaN has sign 0, as in torch
                    value = tl.where(d > 0.0, grad, tl.where(d < 0.0, -grad, 0.0))
                else:
                    value = tl.where(d > beta, beta, tl.where(d < -beta, -beta, d)) * grad
            columns = first + tl.arange(0, BLOCK)
            tl.store(dpred_row + columns, narrow(value, dpred_ptr.dtype.element_ty), mask=inside)
    else:  # without tokens target may have no memory
        for first in range(0, DIM, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            zeros = tl.zeros([BLOCK], dtype=dpred_ptr.dtype.element_ty)
            tl.store(dpred_row + columns, zeros, mask=columns < DIM)


@triton.jit(do_not_specialize=("length", "per_program", "count"))
def feature_mean_kernel(loss_ptr, out_ptr, length, per_program, count, BLOCK: tl.constexpr):
    # grid:     cdiv(length, per_program); a program owns so many numbers
    # in:       loss fp32 [length]
    # out:      out fp32 [programs], their sums over count
    # numerics: fp32, columns of the block apart, then a tree
    # bounds:   the tail is masked
    # cost:     loss read once
    pid = tl.program_id(0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, per_program, BLOCK):
        at = pid * per_program + first + tl.arange(0, BLOCK)
        total += tl.load(loss_ptr + at, mask=at < length, other=0.0)
    tl.store(out_ptr + pid, tl.sum(total, axis=0) / count)


def masked_feature_loss_fwd(
    pred: Tensor,
    target: Tensor,
    ids: Tensor | None,
    layer_norm: bool,
    eps: float,
    kind: int,
    beta: float,
    mean: bool,
) -> Tensor:
    batch, rows, dim = pred.shape
    kind, flat = _kind(kind, beta), _flat(pred, target, ids)
    loss = pred.new_empty((batch, rows), dtype=torch.float32)  # [A, R]
    if pred.numel() == 0:
        # Means over nothing, but for the cosine of vectors without elements.
        loss.fill_(1.0 if kind == COSINE.value else float("nan"))
        return loss.mean() if mean else loss
    _triton.launch(
        masked_feature_loss_fwd_kernel,
        batch * rows,
        pred,
        *(pred, target, ids, loss, rows, *target.shape[:2]),
        *(*pred.stride()[:2], *target.stride()[:2], 0 if ids is None else ids.stride(0), eps, beta),
        FLAT=flat,
        LAYER_NORM=layer_norm,
        KIND=kind,
        **_blocks(dim),
    )
    return _mean(loss) if mean else loss


def masked_feature_loss_bwd(
    grad: Tensor,
    pred: Tensor,
    target: Tensor,
    ids: Tensor | None,
    layer_norm: bool,
    eps: float,
    kind: int,
    beta: float,
    mean: bool,
) -> Tensor:
    batch, rows, dim = pred.shape
    flat = _flat(pred, target, ids)
    dpred = pred.new_empty(pred.shape)  # [A, R, D]
    if dpred.numel() == 0:
        return dpred
    _triton.launch(
        masked_feature_loss_bwd_kernel,
        batch * rows,
        pred,
        *(grad, pred, target, ids, dpred, batch * rows if mean else 1, rows, *target.shape[:2]),
        *((0, 0) if mean else grad.stride()),
        *(*pred.stride()[:2], *target.stride()[:2], 0 if ids is None else ids.stride(0), eps, beta),
        FLAT=flat,
        LAYER_NORM=layer_norm,
        KIND=_kind(kind, beta),
        **_blocks(dim),
    )
    return dpred


def _kind(kind: int, beta: float) -> int:
    """Smooth L1 of so small a beta that nothing is left of the square is L1: 1 / beta may be beyond fp32."""
    return L1.value if kind == SMOOTH_L1.value and beta < 1e-30 else kind


def _flat(pred: Tensor, target: Tensor, ids: Tensor | None) -> bool:
    """Whether ids count the tokens of all images; checks them."""
    flat = pred.shape[0] != target.shape[0]
    if ids is not None:
        limit = target.shape[0] * target.shape[1] if flat else target.shape[1]
        _triton.check_ids("masked_feature_loss", "ids", ids, limit)
    return flat


def _blocks(dim: int) -> dict[str, int]:
    block = max(32, min(MAX_BLOCK, triton.next_power_of_2(dim)))
    return {"DIM": dim, "BLOCK": block, "num_warps": min(8, max(1, block // 256))}


def _mean(loss: Tensor) -> Tensor:
    count = length = loss.numel()
    if length > MEAN_ROWS:
        per_program = triton.cdiv(triton.cdiv(length, MEAN_PROGRAMS), MEAN_BLOCK) * MEAN_BLOCK
        programs = triton.cdiv(length, per_program)
        loss, length = _sums(loss, length, per_program, programs, 1), programs
    return _sums(loss, length, length, 1, count)[0]


def _sums(values: Tensor, length: int, per_program: int, programs: int, count: int) -> Tensor:
    """Sums of `per_program` values each, over `count`."""
    sums = values.new_empty(programs)
    sizes = (length, per_program, count)
    _triton.launch(feature_mean_kernel, programs, values, values, sums, *sizes, BLOCK=MEAN_BLOCK, num_warps=8)
    return sums
