"""Triton kernel of random_mask."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _triton
from mimkernels.ops._triton import precedes, store_ranks

MAX_TOKENS = _triton.MAX_TOKENS


@triton.jit
def philox(seed, counter, image, offset):
    # The four words of Philox4x32-10 with key (seed_lo, seed_hi), counter (counter, image, offset_lo, offset_hi).
    low = (offset & 0xFFFFFFFF).to(tl.uint32)
    high = (offset >> 32).to(tl.uint32)
    zero = counter.to(tl.uint32) * 0
    return tl.philox(seed, counter.to(tl.uint32), zero + image.to(tl.uint32), zero + low, zero + high)


@triton.jit(do_not_specialize=("seed", "offset", *_triton.SIZES))
def random_mask_kernel(
    step_ptr,
    shuffle_ptr,
    restore_ptr,
    mask_ptr,
    seed,
    offset,
    tokens,
    keep,
    blocks,
    SORTED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    # grid:     B * cdiv(N, BLOCK_I); a program ranks BLOCK_I tokens against all tokens of its image
    # in:       seed, offset, and step int64 [] or None, which is added to offset
    # out:      mask fp32 [B, N]; if not SORTED also ids_shuffle, ids_restore int64 [B, N]; every element written once
    # numerics: integers: rank_i = #{j: (noise_j, j) < (noise_i, i)}, noise_i = word i % 4 of Philox counter i / 4
    # bounds:   the tails of i and j are masked; ranks lie in [0, N) by construction; row offsets are int64
    # cost:     N^2 comparisons per image and one Philox block per four tokens and program; noise is never stored
    pid = tl.program_id(0)
    image = pid // blocks
    i = pid % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    # Whatever the types of the arguments, the sum wraps modulo 2^64.
    offset = offset.to(tl.uint64)
    if step_ptr is not None:
        offset = tl.add(offset, tl.load(step_ptr).to(tl.uint64), sanitize_overflow=False)
    first, second, third, fourth = philox(seed, i // 4, image, offset)
    lane = i % 4
    key = tl.where(lane < 2, tl.where(lane == 0, first, second), tl.where(lane == 2, third, fourth))
    before = tl.zeros([BLOCK_I, BLOCK_Q], dtype=tl.int32)
    for start in range(0, tokens, 4 * BLOCK_Q):
        quad = start // 4 + tl.arange(0, BLOCK_Q)
        w0, w1, w2, w3 = philox(seed, quad, image, offset)
        before += precedes(w0, 4 * quad, key, i, tokens) + precedes(w1, 4 * quad + 1, key, i, tokens)
        before += precedes(w2, 4 * quad + 2, key, i, tokens) + precedes(w3, 4 * quad + 3, key, i, tokens)
    rank = tl.sum(before, axis=1)
    store_ranks(rank, i, image, tokens, keep, shuffle_ptr, restore_ptr, mask_ptr, SORTED)


def random_mask_fwd(
    seed: int,
    offset: int,
    step: Tensor | None,
    batch: int,
    tokens: int,
    keep: int,
    sorted: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _triton.mask_outputs(batch, tokens, device)
    if batch == 0 or tokens == 0:
        return outputs
    block_i = min(triton.next_power_of_2(tokens), _triton.RANK_BLOCK)
    blocks = triton.cdiv(tokens, block_i)
    _triton.launch(
        random_mask_kernel,
        batch * blocks,
        outputs[2],
        *(step, *outputs, seed, offset, tokens, keep, blocks),
        SORTED=sorted,
        BLOCK_I=block_i,
        BLOCK_Q=32,
    )
    if sorted:
        _triton.sort_order(outputs, keep)
    return outputs
