"""Triton kernels of upsample_cross_entropy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _triton
from mimkernels.ops._triton import narrow, widen

# 16 x 64 logits are looked up one by one, each with an address of its own: twice as many would spill.
BLOCK_P, MOST_CLASSES, WARPS = 16, 64, 4
BLOCK_SUM = 512  # elements of the gradient per program


@triton.jit
def scaled_place(pixels, step, back):
    # Where the centres of label pixels lie among the logits, times `unit`: whole numbers, int64.
    return tl.maximum(pixels.to(tl.int64) * step - back, 0)


@triton.jit
def second_weight(place, unit):
    # The weight of the second of the two logits around each pixel.
    return (place % unit).to(tl.float32) / unit


@triton.jit
def first_of_cell(cell, source, target, step, back, unit):
    # The first label pixel at or after logit number `cell`; `target` for `source`.
    wanted = tl.maximum(tl.cast(cell, tl.int64) * unit + back, 0)
    first = tl.minimum((wanted + step - 1) // tl.maximum(step, 1), target)
    return tl.where(cell == 0, 0, tl.where((cell >= source) | (step == 0), target, first))


@triton.jit
def between(first, second, weight):
    return (1.0 - weight) * first + weight * second


@triton.jit(do_not_specialize=_triton.SIZES)
def upsample_cross_entropy_fwd_kernel(
    logits_ptr,
    labels_ptr,
    weight_ptr,
    statistics_ptr,
    losses_ptr,
    weights_ptr,
    images,
    classes,
    source_h,
    source_w,
    height,
    width,
    stride_b,
    stride_c,
    stride_h,
    labels_stride_b,
    labels_stride_h,
    step_h,
    back_h,
    unit_h,
    step_w,
    back_w,
    unit_w,
    ignore_index,
    smoothing,
    SMOOTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # grid:     cdiv(B * H * W, BLOCK_P); a program owns BLOCK_P label pixels and loops over the classes
    # in:       logits [B, C, h, w] and labels int64 [B, H, W] by stride, last stride 1; weight fp32 [C] or None
    # out:      statistics fp32 [2, B, H, W], 0 where ignored; losses and weights fp32 [programs], sums over the
    #           program's pixels; every element written exactly once
    # numerics: places in whole numbers; the softmax about the largest logit so far, fp32; sums by trees
    # bounds:   tails of pixels and classes are masked; labels that are no class are ignored; offsets are int64
    # cost:     4 loads, out of the cache, and one exponential per class and pixel; no atomics, deterministic
    pixels = images.to(tl.int64) * height * width
    at = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    x, y, b = at % width, at // width % height, at // width // height
    label = tl.load(labels_ptr + b * labels_stride_b + y * labels_stride_h + x, mask=at < pixels, other=-1)
    counted = (at < pixels) & (label != ignore_index) & (label >= 0) & (label < classes)
    label = tl.where(counted, label, 0)
    place_h, place_w = scaled_place(y, step_h, back_h), scaled_place(x, step_w, back_w)
    down, along = second_weight(place_h, unit_h), second_weight(place_w, unit_w)
    row, column = place_h // unit_h, place_w // unit_w
    top = b * stride_b + row * stride_h
    bottom = b * stride_b + tl.minimum(row + 1, source_h - 1) * stride_h
    right = tl.minimum(column + 1, source_w - 1)
    own_class = label * stride_c
    own_upper = between(
        widen(tl.load(logits_ptr + top + column + own_class, mask=counted, other=0.0)),
        widen(tl.load(logits_ptr + top + right + own_class, mask=counted, other=0.0)),
        along,
    )
    own_lower = between(
        widen(tl.load(logits_ptr + bottom + column + own_class, mask=counted, other=0.0)),
        widen(tl.load(logits_ptr + bottom + right + own_class, mask=counted, other=0.0)),
        along,
    )
    own = between(own_upper, own_lower, down)

    largest = tl.full([BLOCK_P], -3.402823466e38, tl.float32)  # so that logits of -inf lie below it
    total = tl.zeros([BLOCK_P], tl.float32)
    spread = tl.zeros([BLOCK_P], tl.float32)
    class_weights = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, classes, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        here = counted[:, None] & (c < classes)[None, :]
        plane = logits_ptr + c.to(tl.int64)[None, :] * stride_c
        upper = between(
            widen(tl.load(plane + (top + column)[:, None], mask=here, other=0.0)),
            widen(tl.load(plane + (top + right)[:, None], mask=here, other=0.0)),
            along[:, None],
        )
        lower = between(
            widen(tl.load(plane + (bottom + column)[:, None], mask=here, other=0.0)),
            widen(tl.load(plane + (bottom + right)[:, None], mask=here, other=0.0)),
            along[:, None],
        )
        z = tl.where(here, between(upper, lower, down[:, None]), -3.402823466e38)
        following = tl.maximum(largest, tl.max(z, axis=1))
        powers = tl.where(here, tl.exp(z - following[:, None]), 0.0)
        total = total * tl.exp(largest - following) + tl.sum(powers, axis=1)
        largest = following
        if SMOOTH:
            if weight_ptr is None:
                factor = tl.where(c < classes, 1.0, 0.0)
            else:
                factor = tl.load(weight_ptr + c, mask=c < classes, other=0.0)
            spread += tl.sum(tl.where(here, factor[None, :] * (z - own[:, None]), 0.0), axis=1)
            class_weights += tl.sum(factor, axis=0)
    hard = (largest - own) + tl.log(tl.where(counted, total, 1.0))
    if weight_ptr is None:
        weight = tl.where(counted, 1.0, 0.0)
    else:
        weight = tl.load(weight_ptr + label, mask=counted, other=0.0)
    loss = weight * hard
    if SMOOTH:
        loss = (1.0 - smoothing) * loss + smoothing / classes * (class_weights * hard - spread)
    tl.store(statistics_ptr + at, tl.where(counted, largest, 0.0), mask=at < pixels)
    tl.store(statistics_ptr + pixels + at, tl.where(counted, total, 0.0), mask=at < pixels)
    tl.store(losses_ptr + tl.program_id(0), tl.sum(tl.where(counted, loss, 0.0), axis=0))
    tl.store(weights_ptr + tl.program_id(0), tl.sum(weight, axis=0))


@triton.jit(do_not_specialize=_triton.SIZES)
def upsample_cross_entropy_bwd_kernel(
    grad_ptr,
    logits_ptr,
    labels_ptr,
    weight_ptr,
    statistics_ptr,
    totals_ptr,
    parts_ptr,
    images,
    classes,
    source_h,
    source_w,
    height,
    width,
    stride_b,
    stride_c,
    stride_h,
    labels_stride_b,
    labels_stride_h,
    step_h,
    back_h,
    unit_h,
    step_w,
    back_w,
    unit_w,
    ignore_index,
    smoothing,
    SMOOTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # grid:     B * h * w * cdiv(C, BLOCK_C); a program owns BLOCK_C classes of a cell, the label pixels between four
    #           logits, and loops over these pixels
    # in:       as in the forward, its statistics [2, B, H, W] and totals [2]; grad fp32 [1]
    # out:      parts fp32 [B, h, w, 4, C]: what the cell gives to its upper left, upper right, lower left and lower
    #           right logit; every element written exactly once. Where two of these are one logit, the first has both
    # numerics: fp32; sums over BLOCK_P pixels by trees, then in order
    # bounds:   tails of pixels and classes are masked; ignored pixels have factors of 0; offsets are int64
    # cost:     logits read 4 times, parts written once; one exponential per class and label pixel; no atomics,
    #           deterministic
    chunks = tl.cdiv(classes, BLOCK_C)
    cell = tl.program_id(0).to(tl.int64) // chunks
    c = (tl.program_id(0) % chunks) * BLOCK_C + tl.arange(0, BLOCK_C)
    column, row, b = cell % source_w, cell // source_w % source_h, cell // source_w // source_h
    top = first_of_cell(row, source_h, height, step_h, back_h, unit_h)
    rows = first_of_cell(row + 1, source_h, height, step_h, back_h, unit_h) - top
    left = first_of_cell(column, source_w, width, step_w, back_w, unit_w)
    columns = first_of_cell(column + 1, source_w, width, step_w, back_w, unit_w) - left
    count = rows * columns
    plane = logits_ptr + b * stride_b + c.to(tl.int64) * stride_c
    upper_row, lower_row = row * stride_h, tl.minimum(row + 1, source_h - 1) * stride_h
    right = tl.minimum(column + 1, source_w - 1)
    z00 = widen(tl.load(plane + upper_row + column, mask=c < classes, other=0.0))[None, :]
    z01 = widen(tl.load(plane + upper_row + right, mask=c < classes, other=0.0))[None, :]
    z10 = widen(tl.load(plane + lower_row + column, mask=c < classes, other=0.0))[None, :]
    z11 = widen(tl.load(plane + lower_row + right, mask=c < classes, other=0.0))[None, :]
    grad = tl.load(grad_ptr) / tl.load(totals_ptr)
    share = grad * smoothing / classes
    if SMOOTH:
        if weight_ptr is None:
            factor = tl.zeros([BLOCK_C], tl.float32) + 1.0
        else:
            factor = tl.load(weight_ptr + c, mask=c < classes, other=0.0)
    pixels = images.to(tl.int64) * height * width
    sum00 = tl.zeros([BLOCK_C], tl.float32)
    sum01 = tl.zeros([BLOCK_C], tl.float32)
    sum10 = tl.zeros([BLOCK_C], tl.float32)
    sum11 = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, count, BLOCK_P):
        i = start + tl.arange(0, BLOCK_P)
        inside = i < count
        y, x = top + i // columns, left + i % columns
        label = tl.load(labels_ptr + b * labels_stride_b + y * labels_stride_h + x, mask=inside, other=-1)
        counted = inside & (label != ignore_index) & (label >= 0) & (label < classes)
        at = (b * height + y) * width + x
        largest = tl.load(statistics_ptr + at, mask=counted, other=3.402823466e38)
        total = tl.load(statistics_ptr + pixels + at, mask=counted, other=1.0)
        if weight_ptr is None:
            weight = tl.zeros([BLOCK_P], tl.float32) + 1.0
        else:
            weight = tl.load(weight_ptr + label, mask=counted, other=0.0)
        hard = grad * (1.0 - smoothing) * weight
        scale = hard
        if SMOOTH:
            scale += share * tl.load(totals_ptr + 1)
        down = second_weight(scaled_place(y, step_h, back_h), unit_h)[:, None]
        along = second_weight(scaled_place(x, step_w, back_w), unit_w)[:, None]
        z = between(between(z00, z01, along), between(z10, z11, along), down)
        slope = tl.exp(z - largest[:, None]) * (scale / total)[:, None]
        slope -= tl.where(label[:, None] == c[None, :], hard[:, None], 0.0)
        if SMOOTH:
            slope -= share * factor[None, :]
        slope = tl.where(counted[:, None] & (c < classes)[None, :], slope, 0.0)
        lower = down * slope
        upper = slope - lower
        sum00 += tl.sum(upper - along * upper, axis=0)
        sum01 += tl.sum(along * upper, axis=0)
        sum10 += tl.sum(lower - along * lower, axis=0)
        sum11 += tl.sum(along * lower, axis=0)
    last_column, last_row = column + 1 == source_w, row + 1 == source_h
    sum00, sum01 = tl.where(last_column, sum00 + sum01, sum00), tl.where(last_column, 0.0, sum01)
    sum10, sum11 = tl.where(last_column, sum10 + sum11, sum10), tl.where(last_column, 0.0, sum11)
    sum00, sum10 = tl.where(last_row, sum00 + sum10, sum00), tl.where(last_row, 0.0, sum10)
    sum01, sum11 = tl.where(last_row, sum01 + sum11, sum01), tl.where(last_row, 0.0, sum11)
    to = parts_ptr + cell * 4 * classes + c
    tl.store(to, sum00, mask=c < classes)
    tl.store(to + classes, sum01, mask=c < classes)
    tl.store(to + 2 * classes, sum10, mask=c < classes)
    tl.store(to + 3 * classes, sum11, mask=c < classes)


@triton.jit(do_not_specialize=_triton.SIZES)
def sum_of_cells_kernel(parts_ptr, dlogits_ptr, images, classes, source_h, source_w, BLOCK: tl.constexpr):
    # grid:     cdiv(B * C * h * w, BLOCK); a program owns BLOCK elements of dlogits
    # in:       parts fp32 [B, h, w, 4, C]
    # out:      dlogits [B, C, h, w] contiguous: the sum of what the four cells around a logit gave; every element
    #           written exactly once
    # numerics: fp32, rounded once
    # bounds:   the tail is masked; before the first row and column there are no cells; offsets are int64
    # cost:     parts read once, 4 bytes of a sector at a time, from the cache; no atomics, deterministic
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < images.to(tl.int64) * classes * source_h * source_w
    column, rest = i % source_w, i // source_w
    row, plane = rest % source_h, rest // source_h
    c, b = plane % classes, plane // classes
    own = parts_ptr + ((b * source_h + row) * source_w + column) * 4 * classes + c
    above = own - tl.cast(source_w, tl.int64) * 4 * classes
    total = tl.load(own, mask=inside, other=0.0)
    total += tl.load(own - 3 * classes, mask=inside & (column > 0), other=0.0)
    total += tl.load(above + 2 * classes, mask=inside & (row > 0), other=0.0)
    total += tl.load(above - classes, mask=inside & (row > 0) & (column > 0), other=0.0)
    tl.store(dlogits_ptr + i, narrow(total, dlogits_ptr.dtype.element_ty), mask=inside)


def upsample_cross_entropy_fwd(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _triton.check_ids("upsample_cross_entropy", "labels", labels, logits.shape[1], ignore_index)
    statistics = logits.new_empty((2, *labels.shape), dtype=torch.float32)
    programs = triton.cdiv(labels.numel(), BLOCK_P)
    sums = logits.new_empty((2, programs), dtype=torch.float32)
    if programs:
        _triton.launch(
            upsample_cross_entropy_fwd_kernel,
            programs,
            logits,
            *(logits, labels, weight, statistics, sums[0], sums[1]),
            *_sizes(logits, labels, align_corners),
            *(ignore_index, label_smoothing),
            **_constants(logits, label_smoothing),
        )
    loss, counted = sums.sum(1, dtype=torch.float64).unbind()
    whole = sums.new_full((), logits.shape[1], dtype=torch.float64) if weight is None else weight.double().sum()
    return (loss / counted).float(), statistics, torch.stack([counted, whole]).float()


def upsample_cross_entropy_bwd(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    label_smoothing: float,
) -> Tensor:
    images, classes, source_h, source_w = logits.shape
    dlogits = logits.new_empty(logits.shape)
    if dlogits.numel() == 0:
        return dlogits
    parts = logits.new_empty((images, source_h, source_w, 4, classes), dtype=torch.float32)
    constants = _constants(logits, label_smoothing)
    _triton.launch(
        upsample_cross_entropy_bwd_kernel,
        images * source_h * source_w * triton.cdiv(classes, constants["BLOCK_C"]),
        logits,
        *(grad, logits, labels, weight, statistics, totals, parts),
        *_sizes(logits, labels, align_corners),
        *(ignore_index, label_smoothing),
        **constants,
    )
    _triton.launch(
        sum_of_cells_kernel,
        triton.cdiv(dlogits.numel(), BLOCK_SUM),
        logits,
        *(parts, dlogits, images, classes, source_h, source_w),
        BLOCK=BLOCK_SUM,
    )
    return dlogits


def _sizes(logits: Tensor, labels: Tensor, align_corners: bool) -> tuple[int, ...]:
    height, width = labels.shape[1:]
    return (
        *(*logits.shape, height, width, *logits.stride()[:3], *labels.stride()[:2]),
        *_places(logits.shape[2], height, align_corners),
        *_places(logits.shape[3], width, align_corners),
    )


def _places(source: int, target: int, align_corners: bool) -> tuple[int, int, int]:
    """(step, back, unit): label pixel i lies at ``max(0, i * step - back) / unit`` among the logits."""
    if align_corners:
        return source - 1, 0, max(1, target - 1)
    return 2 * source, target - source, max(1, 2 * target)


def _constants(logits: Tensor, label_smoothing: float) -> dict[str, int]:
    return {
        "SMOOTH": label_smoothing > 0,
        "BLOCK_P": BLOCK_P,
        "BLOCK_C": _triton.column_block(logits.shape[1], MOST_CLASSES),
        "num_warps": 2 * WARPS if label_smoothing > 0 else WARPS,  # smoothing takes registers
    }
