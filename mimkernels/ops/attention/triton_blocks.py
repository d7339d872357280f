"""What the Triton kernels of attention and of its companion ops share: tiles, scores, distances, launch arguments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops._triton import INTERPRETED, narrow, valid_id

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# kLeastPatchMass and kLargeLse of csrc (attention): a row whose patches have less attention has no patch entropy,
# and lse of larger size has lost digits that P needs.
LEAST_PATCH_MASS = tl.constexpr(1e-30)
LARGE_LSE = tl.constexpr(16.0)

# Strides of head-dim rows are passed in units of 8 elements where all are multiples of 8: then the compiler knows
# that rows start on 16 bytes and loads them whole.
UNIT = 8

# Sizes and strides take no part in specialisation: alignment is known from UNIT, and so one binary serves every N.
INTEGERS = (
    *(
        "heads",
        "queries",
        "keys",
        "num_prefix",
        "row_blocks",
        "key_blocks",
        "images",
        "per_group",
        "windows",
        "entries",
        "kept_windows",
        "kept_heads",
        "grad_heads",
        "plane",
        "mask_stride_b",
        "pos_stride_b",
        "pos_stride_n",
    ),
    *(f"{name}_stride_{dim}" for name in ("q", "k", "v", "g", "bias") for dim in "bhn"),
)


@triton.jit
def power(t, EXACT: tl.constexpr):
    # 2 ** t, or with EXACT e ** t to the last bits, where a product with log2(e) would have been rounded first.
    if EXACT:
        t = tl.maximum(t, -200.0, propagate_nan=tl.PropagateNan.ALL)
        n = tl.floor(t * LOG2E + 0.5)
        # n times the leading bits of ln 2 is exact.
        rest = (t - n * 0.693359375) + n * 2.12194440e-4
        return tl.exp2(rest * LOG2E) * tl.exp2(n)
    else:
        return tl.exp2(t)


@triton.jit
def load_rows(
    ptr,
    count,
    stride,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    CHECK: tl.constexpr,
):
    # Columns FIRST to FIRST + WIDTH of the rows at ptr, [BLOCK, WIDTH]; zeros beyond column D and, with CHECK, beyond
    # `count` rows.
    rows = tl.arange(0, BLOCK)
    cols = FIRST + tl.arange(0, WIDTH)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if CHECK and FIRST + WIDTH > D:
        return tl.load(ptrs, mask=(rows < count)[:, None] & (cols < D)[None, :], other=0.0)
    elif CHECK:
        return tl.load(ptrs, mask=(rows < count)[:, None], other=0.0)
    elif FIRST + WIDTH > D:
        return tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_head(
    ptr,
    count,
    stride,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK: tl.constexpr,
    CHECK: tl.constexpr,
):
    # Both pieces of the rows at ptr; the first one twice where there is no second.
    piece0 = load_rows(ptr, count, stride, 0, D0, D, BLOCK, CHECK)
    if D1 > 0:
        return piece0, load_rows(ptr, count, stride, D0, D1, D, BLOCK, CHECK)
    else:
        return piece0, piece0


@triton.jit
def store_rows(
    ptr, value, count, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    # The columns of load_rows, rounded to the dtype of ptr; what is beyond `count` rows or column D is left alone.
    rows = tl.arange(0, BLOCK)
    cols = FIRST + tl.arange(0, WIDTH)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    mask = (rows < count)[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (cols < D)[None, :]
    tl.store(ptrs, narrow(value, ptr.dtype.element_ty), mask=mask)


@triton.jit
def head_bias(
    bias_ptr,
    table_ptr,
    index_ptr,
    b,
    h,
    heads,
    windows,
    entries,
    bias_stride_b,
    bias_stride_h,
    bias_stride_n,
    BIAS_UNIT: tl.constexpr,
):
    # What is added to the scores of head h of image b, which takes row b % windows of the bias: bias and table, each or
    # None, where the head's [Nq, Nk] and its column of [T, H] begin in them, and what leads on from there.
    place = (b % windows * bias_stride_b + h * bias_stride_h) * BIAS_UNIT
    return bias_ptr, table_ptr, index_ptr, place, h, bias_stride_n.to(tl.int64) * BIAS_UNIT, heads, entries


@triton.jit
def added_bias(bias, rows, cols, here, keys, TRANSPOSED: tl.constexpr, CHECK: tl.constexpr):
    # The sum, fp32 [queries, keys] or its transpose, of the bias and the table of a head_bias that has one of them; 0,
    # with CHECK, where not `here`. Indices outside the table add 0.
    bias_ptr, table_ptr, index_ptr, place, h, bias_stride_n, heads, entries = bias
    value = 0.0
    if bias_ptr is not None:
        over_rows = bias_ptr + place + rows.to(tl.int64) * bias_stride_n
        ptrs = along(over_rows, True, TRANSPOSED) + along(cols, False, TRANSPOSED)
        if CHECK:
            value = tl.load(ptrs, mask=here, other=0.0).to(tl.float32)
        else:
            value = tl.load(ptrs).to(tl.float32)
    if table_ptr is not None:
        over_rows = index_ptr + rows.to(tl.int64) * keys
        ptrs = along(over_rows, True, TRANSPOSED) + along(cols, False, TRANSPOSED)
        if CHECK:
            entry = valid_id(tl.load(ptrs, mask=here, other=-1), entries)
        else:
            entry = valid_id(tl.load(ptrs), entries)
        value += tl.load(table_ptr + h + entry.to(tl.int64) * heads, mask=entry >= 0, other=0.0).to(tl.float32)
    return value


@triton.jit
def allowed_keys(mask_row, cols, keys):
    # bool [N]: keys that exist and that the key mask, where there is one, lets attend.
    if mask_row is not None:
        return tl.load(mask_row + cols, mask=cols < keys, other=0) != 0
    else:
        return cols < keys


@triton.jit
def masked_keys(score, mask_row, cols, keys, CHECK: tl.constexpr):
    # score with -inf in the columns of keys that may not be attended.
    if CHECK:
        allowed = allowed_keys(mask_row, cols, keys)
    else:
        allowed = tl.load(mask_row + cols) != 0
    return tl.where(allowed[None, :], score, float("-inf"))


@triton.jit
def load_point(ptr, DIMS: tl.constexpr):
    # Up to three coordinates of each point; those beyond DIMS are 0.
    x0 = tl.load(ptr)
    x1 = x0 * 0.0
    x2 = x1
    if DIMS > 1:
        x1 = tl.load(ptr + 1)
    if DIMS > 2:
        x2 = tl.load(ptr + 2)
    return x0, x1, x2


@triton.jit
def distance_block(x0, x1, x2, pos_image, cols, keys, stride, DIMS: tl.constexpr):
    # Euclidean distances [M, N] from the points x to the keys' points. Keys beyond the last get the last one's.
    inside = tl.minimum(cols, keys - 1).to(tl.int64)
    y0, y1, y2 = load_point(pos_image + inside * stride, DIMS)
    difference = x0[:, None] - y0[None, :]
    square = difference * difference
    if DIMS > 1:
        difference = x1[:, None] - y1[None, :]
        square += difference * difference
    if DIMS > 2:
        difference = x2[:, None] - y2[None, :]
        square += difference * difference
    return tl.sqrt(square)


@triton.jit
def along(value, QUERIES: tl.constexpr, TRANSPOSED: tl.constexpr):
    # A vector over queries or keys, as the rows or columns of a tile [queries, keys], or of its transpose.
    if QUERIES != TRANSPOSED:
        return value[:, None]
    else:
        return value[None, :]


@triton.jit
def load_row(ptr, place, some):
    return tl.load(ptr + place, mask=some, other=0.0)


@triton.jit
def load_levels(lse_ptr, low_ptr, place, some, EXACT: tl.constexpr):
    # (lse, lse_low in the units of exponents) of some queries. Where nothing may be attended, and beyond the last
    # query, lse is +inf: then every probability is 0.
    lse = tl.load(lse_ptr + place, mask=some, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    low = tl.load(low_ptr + place, mask=some, other=0.0)
    if EXACT:
        return lse, low
    else:
        return lse, low * LOG2E


@triton.jit
def exponents(
    score,
    rows,
    cols,
    lse,
    low,
    bias,
    mask_row,
    queries,
    keys,
    scale,
    TRANSPOSED: tl.constexpr,
    CHECK: tl.constexpr,
    EXACT: tl.constexpr,
):
    # t of P = 2 ** t (e ** t if EXACT) from dots q k and the levels of load_levels; -inf where a key is masked or, with
    # CHECK, beyond the last. lse is subtracted from whole scores, of which it is one but for lse_low and the row's
    # spread: huge scores, as a bias of -1e9 makes them, leave differences that have lost nothing.
    if (bias[0] is not None) or (bias[1] is not None):
        # Tails read no bias: without queries or keys there is none.
        here = along(rows < queries, True, TRANSPOSED) & along(cols < keys, False, TRANSPOSED)
        added = added_bias(bias, rows, cols, here, keys, TRANSPOSED, True)
        t = tl.fma(score, scale, added) - along(lse, True, TRANSPOSED)
    else:
        t = tl.fma(score, scale, -along(lse, True, TRANSPOSED))
    if EXACT:
        t -= along(low, True, TRANSPOSED)
    else:
        t = tl.fma(t, LOG2E, -along(low, True, TRANSPOSED))
    if CHECK or mask_row is not None:
        allowed = allowed_keys(mask_row, cols, keys)
        t = tl.where(along(allowed, False, TRANSPOSED), t, float("-inf"))
    return t


@triton.jit
def locate(pid, heads, row_blocks, BLOCK: tl.constexpr):
    # (head among all images, image, head, first row) of a program; blocks of one head are neighbours.
    head = pid // row_blocks
    return head, (head // heads).to(tl.int64), (head % heads).to(tl.int64), pid % row_blocks * BLOCK


def head_split(dim: int, dtype: torch.dtype, backward: bool = False) -> tuple[int, int]:
    """(D0, D1): the head dim as one power of two, or as two where that pads less: 80 = 64 + 16. D1 = 0 for one.

    Without tensor cores the products of the backward pass over 128 columns want more registers than there are: there
    one piece has at most 64. Such products add one feature after another, so that scores have the same bits in one
    piece and in two; the interpreter's do not, and so it takes two forward as well.
    """
    narrow_pieces = precision_name(dtype) == "fp32" and (backward or INTERPRETED.value)
    whole = max(16, triton.next_power_of_2(dim))
    rest = dim - whole // 2
    second = max(16, triton.next_power_of_2(rest))
    shorter = whole // 2 + second < whole
    too_wide = whole > (64 if narrow_pieces else 128)
    return (whole // 2, second) if whole > 32 and (shorter or too_wide) else (whole, 0)


def strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """(unit, the three outer strides of each tensor in that unit)."""
    found = [tensor.stride(dim) for tensor in tensors for dim in range(3)]
    unit = UNIT if all(stride % UNIT == 0 for stride in found) else 1
    return unit, [stride // unit for stride in found]


def precision_name(dtype: torch.dtype) -> str:
    """The column of the table of block sizes."""
    if dtype != torch.float32:
        return "half"
    return "fp32" if dot_precision(dtype) == "ieee" else "tf32"


def dot_precision(dtype: torch.dtype) -> str:
    """TF32 products of fp32 inputs only where torch's own setting allows them."""
    # allow_tf32, the older name of the setting, cannot be read once the newer one was set.
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def position_strides(key_mask: Tensor | None, positions: Tensor | None) -> tuple[int, int, int]:
    """Strides (mask over images, positions over images, positions over tokens), 0 where one serves all images."""
    if positions is None:
        return 0 if key_mask is None else key_mask.stride(0), 0, 0
    over_images = 0 if positions.shape[0] == 1 else positions.stride(0)
    return 0 if key_mask is None else key_mask.stride(0), over_images, positions.stride(1)


def architecture(device: torch.device) -> int:
    """The architecture whose committed block sizes serve this device: 80, 90 or 100."""
    if device.type != "cuda":
        return 90
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)
