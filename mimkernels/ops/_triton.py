"""What the Triton kernels share: launching, block sizes, checks, and the device functions of several ops."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Grid axis 0 is the only one used: it alone goes beyond 65535.
MAX_PROGRAMS = 2**31 - 1
# A tile is what one program holds: 16 KiB in fp32 registers for 16-bit rows, so that each of its 128 threads has
# four 16-byte loads in flight. Below SMALL_BYTES such tiles would leave multiprocessors idle.
TILE_BYTES, TILE_WARPS = 8192, 4
SMALL_TILE_BYTES, SMALL_TILE_WARPS = 2048, 2
SMALL_BYTES = 4 * 2**20
# Sums over the batch: enough programs for a large GPU, few enough that their partial sums stay small. A constant,
# not the device's size, so that every device adds in the same order.
SUM_PROGRAMS = 1024

# ptxas spills a few registers of the summing kernels to fit one more program on a multiprocessor, unless it is given
# a cap of its own; 12 warps of 168 registers have enough loads in flight.
SUM_REGISTERS = 168
# Ranking compares every token with every other: quadratic, so that a sort wins for long sequences.
MAX_TOKENS = 2048
RANK_BLOCK = 64

# Sizes that differ between batches, with the share of masked patches, or in a short last batch. Triton compiles a
# kernel anew, a second or two, for each class of an integer (1, multiples of 16, others) unless told not to; these tell
# it nothing. Widths and strides of rows stay: on their classes depends how wide accesses are.
SIZES = (
    *("images", "masks", "rows", "tokens", "kept", "keep", "num_prefix", "parts"),
    *("row_blocks", "token_blocks", "per_group", "per_chunk", "ids_stride", "ids_stride_m", "ids_stride_b"),
)

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def launch(kernel: Any, programs: int, on: Tensor, *args: object, **options: object) -> None:
    """Run ``programs`` programs of ``kernel`` on the device of ``on``, asynchronously."""
    if programs > MAX_PROGRAMS:
        raise ValueError(f"{kernel.__name__} needs {programs} programs but a grid holds at most {MAX_PROGRAMS}")
    if on.device.type == "cpu" and not INTERPRETED.value:
        raise RuntimeError(
            f"{kernel.__name__} got tensors on the CPU; Triton runs there only with TRITON_INTERPRET=1 in the "
            "environment before triton is imported"
        )
    other_device = on.device.type == "cuda" and on.device.index != torch.cuda.current_device()
    with torch.cuda.device(on.device) if other_device else nullcontext():
        kernel[(programs,)](*args, **options)


def check_ids(op: str, name: str, ids: Tensor, size: int, allowed: int | None = None) -> None:
    """Refuse ids outside ``[0, size)``, but for `allowed`.

    Only where looking costs no device sync, or where MIMKERNELS_DEBUG asks for it. Unchecked ids are safe:
    kernels read zeros for them and write nothing outside their outputs.
    """
    debug = os.environ.get("MIMKERNELS_DEBUG", "0") not in ("", "0")
    if ids.numel() == 0 or not (ids.device.type == "cpu" or (ids.device.type == "cuda" and debug)):
        return
    if allowed is not None:
        ids = ids.masked_fill(ids == allowed, 0)
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= size:
        raise IndexError(f"{op}: {name} holds {low if low < 0 else high}, outside [0, {size})")


def column_block(columns: int, most: int = 1024) -> int:
    """Columns per program: the widest power of two that idles at most an eighth of its lanes on the last block."""
    if columns <= 64:
        return max(16, triton.next_power_of_2(columns))
    widths = [width for width in (1024, 512, 256, 128, 64) if width <= most]
    padded = [triton.cdiv(columns, width) * width for width in widths]
    for width, total in zip(widths, padded, strict=True):
        if 8 * (total - columns) <= total:
            return width
    return widths[padded.index(min(padded))]


def tile(samples: int, rows: int, columns: int, *, itemsize: int, run: int = 16) -> tuple[int, int, int]:
    """(BLOCK_R, BLOCK_D, num_warps) for a memory-bound pass over ``[samples, rows, columns]``.

    ``run`` elements are neighbours in memory on the other side of the pass.
    """
    small = samples * rows * columns * itemsize < SMALL_BYTES
    size, warps = (SMALL_TILE_BYTES, SMALL_TILE_WARPS) if small else (TILE_BYTES, TILE_WARPS)
    if columns % 16 or run % 8:
        # Element-wise accesses keep one 64-bit address each in registers; a full tile of them would spill.
        size = size // 4
    elements = size // max(itemsize, 2)
    block_d = column_block(columns, min(1024, elements))
    return min(elements // block_d, triton.next_power_of_2(max(rows, 1))), block_d, warps


def batch_groups(images: int, blocks: int) -> tuple[int, int]:
    """(groups, images per group) for a sum over the batch whose output takes ``blocks`` programs."""
    groups = max(1, min(images, triton.cdiv(SUM_PROGRAMS, max(blocks, 1))))
    per_group = triton.cdiv(images, groups)
    return triton.cdiv(images, per_group), per_group


def mask_outputs(batch: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised (ids_shuffle, ids_restore, mask), each ``[B, N]``."""
    if tokens > MAX_TOKENS:
        raise ValueError(f"the Triton kernels rank at most {MAX_TOKENS} tokens, got {tokens}")
    ids_shuffle = torch.empty((batch, tokens), dtype=torch.int64, device=device)
    mask = torch.empty((batch, tokens), dtype=torch.float32, device=device)
    return ids_shuffle, torch.empty_like(ids_shuffle), mask


def sort_order(outputs: tuple[Tensor, Tensor, Tensor], keep: int) -> None:
    """Fill ids_shuffle and ids_restore from the mask, kept and removed tokens each ascending."""
    ids_shuffle, ids_restore, mask = outputs
    batch, tokens = mask.shape
    block = triton.next_power_of_2(tokens)
    launch(sorted_order_kernel, batch, mask, mask, ids_shuffle, ids_restore, tokens, keep, BLOCK_N=block)


def match_block(kept: int, block_r: int) -> int:
    """Ids compared at once by ``gathered_sum``: all of them where that is at most 64 comparisons a thread."""
    return max(16, min(triton.next_power_of_2(max(kept, 1)), 8192 // block_r))


@triton.jit
def widen(value):
    # fp32 of any float or uint8. The interpreter's own conversion of bf16 subnormals is wrong.
    if INTERPRETED and value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    # fp32 to dtype, to nearest even. The interpreter truncates to bf16 where the hardware rounds.
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = (bits >> 16) | 0x40
        return tl.where(value != value, quiet_nan, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def add_term(total, lost, term, COMPENSATED: tl.constexpr):
    # (total, lost) + term: an fp32 sum and what its roundings have lost, about twice the digits of either. Needed where
    # the result is fp32; of a result of 16 bits nothing is lost. Only additions, which no compiler reorders.
    if COMPENSATED:
        following = total + term
        part = following - total
        return following, lost + ((total - (following - part)) + (term - part))
    else:
        return total + term, lost


@triton.jit
def add_sums(total, lost, other, other_lost):
    # Two sums of add_term.
    return add_term(total, lost + other_lost, other, True)


@triton.jit
def rest(lost):
    # Of infinity or NaN nothing is lost.
    return tl.where(lost == lost, lost, 0.0)


@triton.jit
def add_rows(total, lost, COMPENSATED: tl.constexpr):
    # The sum over axis 0, by a tree, of sums of add_term. The interpreter is slow with a function of ours, and adds
    # in fp64.
    if not COMPENSATED:
        return tl.sum(total, axis=0), tl.sum(lost, axis=0)
    elif INTERPRETED:
        exact = tl.sum(total.to(tl.float64) + rest(lost).to(tl.float64), axis=0)
        rounded = exact.to(tl.float32)
        return rounded, (exact - rounded.to(tl.float64)).to(tl.float32)
    else:
        return tl.reduce((total, lost), 0, add_sums)


@triton.jit
def store_sum(ptr, total, lost, parts, elements, mask, COMPENSATED: tl.constexpr):
    # A partial sum, one of `parts` of `elements` each: itself and, as one more part, what it has lost. The only part is
    # the result.
    if COMPENSATED:
        more = ptr + tl.cast(parts, tl.int64) * elements
        tl.store(more, rest(lost), mask=mask & (parts > 1))
        total = tl.where(parts > 1, total, total + rest(lost))
    tl.store(ptr, narrow(total, ptr.dtype.element_ty), mask=mask)


@triton.jit
def valid_id(ids, size):
    # int32 ids; those outside [0, size) become -2, which equals no row and is no source.
    return tl.where((ids >= 0) & (ids < size), ids, -2).to(tl.int32)


@triton.jit
def precedes(key_j, j, key_i, i, tokens):
    # int32 [I, J]: 1 where token j ranks before token i. Equal keys rank by index.
    less = (key_j[None, :] < key_i[:, None]) | ((key_j[None, :] == key_i[:, None]) & (j[None, :] < i[:, None]))
    return (less & (j < tokens)[None, :]).to(tl.int32)


@triton.jit
def store_ranks(rank, i, image, tokens, keep, shuffle_ptr, restore_ptr, mask_ptr, SORTED: tl.constexpr):
    # What the ranks of BLOCK_I tokens of one image determine; in sorted order that is only the mask.
    row = image.to(tl.int64) * tokens
    tl.store(mask_ptr + row + i, (rank >= keep).to(tl.float32), mask=i < tokens)
    if not SORTED:
        tl.store(restore_ptr + row + i, rank.to(tl.int64), mask=i < tokens)
        tl.store(shuffle_ptr + row + rank, i.to(tl.int64), mask=i < tokens)


@triton.jit(do_not_specialize=("keep",))
def sorted_order_kernel(mask_ptr, shuffle_ptr, restore_ptr, tokens, keep, BLOCK_N: tl.constexpr):
    # grid:     B; a program owns one image
    # in:       mask fp32 [B, N], contiguous, with exactly `keep` zeros per image
    # out:      ids_shuffle and ids_restore int64 [B, N]: kept, then removed tokens, each ascending; written once
    # numerics: integers
    # bounds:   the tail is masked; N <= BLOCK_N; offsets are int64
    # cost:     mask read once, both outputs written once; no atomics, deterministic
    row = tl.program_id(0).to(tl.int64) * tokens
    i = tl.arange(0, BLOCK_N)
    removed = tl.load(mask_ptr + row + i, mask=i < tokens, other=1.0) != 0.0
    kept = tl.where(removed, 0, 1)
    kept_before = tl.cumsum(kept, axis=0) - kept
    place = tl.where(removed, keep + i - kept_before, kept_before)
    tl.store(restore_ptr + row + i, place.to(tl.int64), mask=i < tokens)
    tl.store(shuffle_ptr + row + place, i.to(tl.int64), mask=i < tokens)


@triton.jit
def gathered_sum(
    ids_ptr,
    grad_ptr,
    targets,
    target_ok,
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
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The transpose of a gather, owned by its output: for each target token n the fp32 sum, m then k ascending, of
    # grad[m * B + image, P + k, cols] over all ids[m, image, k] == n, and what it has lost (add_term).
    # [BLOCK_R, BLOCK_D]; zero where nothing matches.
    # One comparison of the ids with the targets finds the number of matches; unique ids take one round.
    COMPENSATED: tl.constexpr = grad_ptr.dtype.element_ty == tl.float32
    acc = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    lost = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    wanted = tl.where(target_ok, targets, -1)
    ids_row = ids_ptr + image * ids_stride_b
    grad_row = grad_ptr + image * grad_stride_b
    for _ in range(masks):
        for start in range(0, kept, BLOCK_K):
            ks = start + tl.arange(0, BLOCK_K)
            ids = valid_id(tl.load(ids_row + ks, mask=ks < kept, other=-2), tokens)
            match = wanted[:, None] == ids[None, :]
            rounds = tl.max(tl.sum(match.to(tl.int32), axis=1), axis=0)
            last = tl.full([BLOCK_R], -1, dtype=tl.int32)
            for _ in range(rounds):
                left = match & (ks[None, :] > last[:, None])
                last = tl.min(tl.where(left, ks[None, :], 0x7FFFFFFF), axis=1)
                found = last != 0x7FFFFFFF
                offsets = (num_prefix + tl.where(found, last, 0)).to(tl.int64) * grad_stride_r
                mask = found[:, None] & cols_ok[None, :]
                term = widen(tl.load(grad_row + offsets[:, None] + cols[None, :], mask=mask, other=0.0))
                acc, lost = add_term(acc, lost, term, COMPENSATED)
        ids_row += ids_stride_m
        grad_row += grad_stride_m
    return acc, lost


@triton.jit
def patch_offset(n, grid_h, grid_w, stride_t, stride_h, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    # Where patch n = (t', h', w'), row-major over the grid, starts in its image; int64, last stride 1.
    h = n // grid_w % grid_h
    t = n // grid_w // grid_h
    return (t * PT).to(tl.int64) * stride_t + (h * PH).to(tl.int64) * stride_h + (n % grid_w) * PW


@triton.jit
def pixel_offset(
    e,
    stride_c,
    stride_t,
    stride_h,
    CHANNELS: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    # (int64 offset from the patch's start, channel) of element e in order (t, h, w, c) or (c, t, h, w).
    # The divisors are constants, so that the compiler sees runs of PW neighbours and loads them as vectors.
    if CHANNELS_LAST:
        channel = e % CHANNELS
        pixel = e // CHANNELS
    else:
        channel = e // (PT * PH * PW)
        pixel = e % (PT * PH * PW)
    w = pixel % PW
    h = pixel // PW % PH
    t = pixel // (PW * PH)
    offset = channel.to(tl.int64) * stride_c + t.to(tl.int64) * stride_t + h.to(tl.int64) * stride_h + w
    return offset, channel


@triton.jit(do_not_specialize=SIZES)
def batch_sum_kernel(
    grad_ptr,
    out_ptr,
    images,
    rows,
    columns,
    per_group,
    chunks,
    grad_stride_b,
    grad_stride_r,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # grid:     groups * rows * chunks; a program adds one row's columns over one group of images
    # in:       grad [B, >= rows, D] by stride, last stride 1
    # out:      out [groups, rows, D], fp32 (then, of fp32 rows, what the sums have lost) or, for a single group, the
    #           dtype wanted; every element written once
    # numerics: fp32, of fp32 rows compensated; images are added BLOCK_B apart, then by a tree: the order depends on
    #           sizes alone
    # bounds:   offsets are int64; the tails of group and columns are masked
    # cost:     grad[:, :rows] read once; no atomics, deterministic
    pid = tl.program_id(0)
    cols = pid % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    row = (pid // chunks % rows).to(tl.int64)
    group = (pid // chunks // rows).to(tl.int64)
    end = tl.minimum((group + 1) * per_group, images)
    COMPENSATED: tl.constexpr = grad_ptr.dtype.element_ty == tl.float32
    acc = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float32)
    lost = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float32)
    for step in range(0, per_group, BLOCK_B):
        image = group * per_group + step + tl.arange(0, BLOCK_B)
        mask = (image < end)[:, None] & (cols < columns)[None, :]
        source = grad_ptr + image[:, None] * grad_stride_b + row * grad_stride_r + cols[None, :]
        acc, lost = add_term(acc, lost, widen(tl.load(source, mask=mask, other=0.0)), COMPENSATED)
    out = out_ptr + (group * rows + row) * columns + cols
    acc, lost = add_rows(acc, lost, COMPENSATED)
    store_sum(out, acc, lost, tl.cdiv(images, per_group), rows * columns, cols < columns, COMPENSATED)


@triton.jit(do_not_specialize=SIZES)
def sum_partials_kernel(
    partial_ptr,
    out_ptr,
    parts,
    length,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    # grid:     cdiv(L, BLOCK_L)
    # in:       partial fp32 [S, L], contiguous
    # out:      out [L] = sum over S; every element written once
    # numerics: fp32, compensated; parts are added BLOCK_S apart, then by a tree: the order depends on sizes alone
    # bounds:   offsets are int64; both tails are masked
    # cost:     partial read once; no atomics, deterministic
    cols = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    acc = tl.zeros([BLOCK_S, BLOCK_L], dtype=tl.float32)
    lost = tl.zeros([BLOCK_S, BLOCK_L], dtype=tl.float32)
    for start in range(0, parts, BLOCK_S):
        part = start + tl.arange(0, BLOCK_S)
        mask = (part < parts)[:, None] & (cols < length)[None, :]
        term = tl.load(partial_ptr + part.to(tl.int64)[:, None] * length + cols[None, :], mask=mask, other=0.0)
        acc, lost = add_term(acc, lost, term, True)
    acc, lost = add_rows(acc, lost, True)
    tl.store(out_ptr + cols, narrow(acc + rest(lost), out_ptr.dtype.element_ty), mask=cols < length)


def partials(parts: int, shape: tuple[int, ...], like: Tensor, *, compensated: bool = False) -> tuple[Tensor, Tensor]:
    """(partial sums ``[parts, *shape]``, result ``shape`` in the dtype of ``like``); one tensor for a single part.

    Where they are ``compensated`` and the result is fp32, what they have lost are as many parts more (`store_sum`).
    """
    out = like.new_empty(shape)
    if parts == 1:
        return out, out
    if compensated and like.dtype == torch.float32:
        parts *= 2
    return like.new_empty((parts, *shape), dtype=torch.float32), out


def sum_partials(partial: Tensor | None, out: Tensor) -> Tensor:
    """``out`` = ``partial`` ``[S, *out.shape]`` summed over S in a fixed order; a single part is ``out`` itself."""
    if partial is not None and partial is not out:
        length, parts = out.numel(), partial.shape[0]
        block_s = min(triton.next_power_of_2(parts), 32)
        block_l = 2048 // block_s
        args = (partial, out, parts, length)
        options = {"BLOCK_S": block_s, "BLOCK_L": block_l, "maxnreg": SUM_REGISTERS}
        launch(sum_partials_kernel, triton.cdiv(length, block_l), out, *args, **options)
    return out


def batch_sum(grad: Tensor, rows: int) -> Tensor:
    """``grad[:, :rows].sum(0)`` of ``[B, R, D]`` in its dtype, added in a fixed order. B > 0, rows * D > 0."""
    images, _, columns = grad.shape
    block_d = column_block(columns, 256)
    chunks = triton.cdiv(columns, block_d)
    block_b = min(triton.next_power_of_2(images), 4096 // block_d)
    # A group fills its tile at least once.
    groups, per_group = batch_groups(triton.cdiv(images, block_b), rows * chunks)
    partial, out = partials(groups, (rows, columns), grad, compensated=True)
    args = (grad, partial, images, rows, columns, per_group * block_b, chunks, grad.stride(0), grad.stride(1))
    launch(batch_sum_kernel, groups * rows * chunks, grad, *args, BLOCK_B=block_b, BLOCK_D=block_d)
    return sum_partials(partial, out)
