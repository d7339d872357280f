"""Triton kernels of query_pool's forward with few queries, which reads the tokens once.

Each program pools a chunk of an image by an online softmax, and the chunks are combined in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _triton
from mimkernels.ops._triton import narrow, widen
from mimkernels.ops._triton_pool import _image_stride, _mask_stride, allowed_tokens, softmax

# The widest token that a program holds.
MOST_COLUMNS = 2048


# Of more images there are fewer chunks of each.
@triton.jit(do_not_specialize=("chunks", *_triton.SIZES))
def pool_chunk_kernel(
    x_ptr,
    queries_ptr,
    values_ptr,
    mask_ptr,
    scores_ptr,
    sums_ptr,
    most_ptr,
    scale,
    groups,
    tokens,
    dim,
    width,
    num_prefix,
    chunks,
    per_chunk,
    x_stride_b,
    x_stride_n,
    queries_stride_b,
    queries_stride_g,
    values_stride_b,
    values_stride_n,
    slice_columns,
    mask_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # grid:     B * chunks * G, queries fastest; a program pools one chunk of an image for one query
    # in:       x [B, N, D], queries [B, G, D] (stride 0 where shared), values [B, N, W] or None (then x), by stride,
    #           last stride 1; query g pools columns from g * slice_columns on; mask [B, N] bool or None
    # out:      scores fp32 [B, G, N]; sums fp32 [B, G, chunks, W], the weighted sums of exp(score - most); most fp32
    #           [B, G, chunks], the largest score (-inf where no token is allowed); every element written once
    # numerics: fp32, online softmax; blocks in order
    # bounds:   tails and tokens that are not allowed read as zeros and score -inf; offsets are int64
    # cost:     x (and values) read once, by the G programs of a chunk together; no atomics, deterministic
    pid = tl.program_id(0)
    g = pid % groups
    chunk = pid // groups % chunks
    b = (pid // groups // chunks).to(tl.int64)
    row = (b * groups + g) * chunks + chunk
    cols = tl.arange(0, BLOCK_D)
    out_cols = tl.arange(0, BLOCK_W)
    q = widen(tl.load(queries_ptr + b * queries_stride_b + g.to(tl.int64) * queries_stride_g + cols, mask=cols < dim))
    q = tl.where(cols < dim, q, 0.0)
    first = chunk * per_chunk
    end = tl.minimum(first + per_chunk, tokens)
    most = float("-inf")
    acc = tl.zeros([BLOCK_W], dtype=tl.float32)
    for start in range(first, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        ok = allowed_tokens(n, b, mask_ptr, mask_stride, num_prefix, end)
        rows = n.to(tl.int64)[:, None]
        x_at = x_ptr + b * x_stride_b + rows * x_stride_n + cols[None, :]
        x = widen(tl.load(x_at, mask=ok[:, None] & (cols < dim)[None, :], other=0.0))
        score = tl.where(ok, tl.sum(x * q[None, :], axis=1) * scale, float("-inf"))
        tl.store(scores_ptr + (b * groups + g) * tokens + n, score, mask=n < end)
        before = most
        most = tl.maximum(most, tl.max(score, axis=0))
        level = tl.where(most == float("-inf"), 0.0, most)
        weight = tl.exp(score - level)
        if values_ptr is not None:
            v_at = values_ptr + b * values_stride_b + rows * values_stride_n + g * slice_columns + out_cols[None, :]
            v = widen(tl.load(v_at, mask=ok[:, None] & (out_cols < width)[None, :], other=0.0))
        else:
            v = x
        acc = acc * tl.exp(before - level) + tl.sum(weight[:, None] * v, axis=0)
    tl.store(sums_ptr + row * width + out_cols, acc, mask=out_cols < width)
    tl.store(most_ptr + row, most)


@triton.jit(do_not_specialize=("chunks",))
def pool_combine_kernel(
    sums_ptr,
    most_ptr,
    level_ptr,
    out_ptr,
    chunks,
    width,
    blocks,
    BLOCK_W: tl.constexpr,
):
    # grid:     B * G * blocks; a program combines the chunks of one row, BLOCK_W columns wide
    # in:       sums fp32 [B, G, chunks, W], most fp32 [B, G, chunks], level fp32 [B, G, 2] = (largest score, 1 / sum)
    # out:      out [B, G, W]; every element written once
    # numerics: fp32, chunks in order, rounded once
    # bounds:   the column tail is masked; offsets are int64
    # cost:     sums read once; no atomics, deterministic
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    cols = pid % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    level = tl.load(level_ptr + 2 * row)
    inverse = tl.load(level_ptr + 2 * row + 1)
    acc = tl.zeros([BLOCK_W], dtype=tl.float32)
    for chunk in range(chunks):
        part = row * chunks + chunk
        worth = tl.exp(tl.load(most_ptr + part) - level)
        acc += worth * tl.load(sums_ptr + part * width + cols, mask=cols < width, other=0.0)
    tl.store(out_ptr + row * width + cols, narrow(acc * inverse, out_ptr.dtype.element_ty), mask=cols < width)


def pool_in_one_pass(
    x: Tensor,
    queries: Tensor,
    values: Tensor | None,
    mask: Tensor | None,
    scale: float,
    num_prefix: int,
    sliced: bool,
    out: Tensor,
    weights: Tensor,
) -> None:
    """Fill ``out`` ``[B, G, W]`` and ``weights`` ``[B, G, N]``; the tokens are at most MOST_COLUMNS wide."""
    batch, tokens, dim = x.shape
    groups, width = out.shape[1:]
    block_d = max(16, triton.next_power_of_2(dim))
    # Slices of the tokens themselves are loaded again, from L1.
    pooled = x if values is None and sliced else values
    block_w = block_d if pooled is None else max(16, triton.next_power_of_2(width))
    block_n = max(2, min(16, 4096 // max(block_d, block_w)))
    chunks = max(1, min(triton.cdiv(_triton.SUM_PROGRAMS, batch * groups), triton.cdiv(tokens, 4 * block_n)))
    per_chunk = triton.cdiv(triton.cdiv(tokens, chunks), block_n) * block_n
    chunks = triton.cdiv(tokens, per_chunk)
    sums = x.new_empty((batch, groups, chunks, width), dtype=torch.float32)
    most = x.new_empty((batch, groups, chunks), dtype=torch.float32)
    level = x.new_empty((batch, groups, 2), dtype=torch.float32)
    values_strides = (0, 0) if pooled is None else (pooled.stride(0), pooled.stride(1))
    _triton.launch(
        pool_chunk_kernel,
        batch * chunks * groups,
        x,
        *(x, queries, pooled, mask, weights, sums, most, scale, groups, tokens, dim, width, num_prefix),
        *(chunks, per_chunk, x.stride(0), x.stride(1), *_image_stride(queries), *values_strides),
        *(width if sliced else 0, _mask_stride(mask)),
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        BLOCK_W=block_w,
        num_warps=4 if block_d <= 1024 else 8,
    )
    softmax(weights, mask, weights, level, True, num_prefix)
    block = _triton.column_block(width, 512)
    blocks = triton.cdiv(width, block)
    args = (sums, most, level, out, chunks, width, blocks)
    _triton.launch(pool_combine_kernel, batch * groups * blocks, out, *args, BLOCK_W=block, num_warps=4)
