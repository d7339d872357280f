"""Triton kernel of mask_from_noise."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mimkernels.ops import _triton
from mimkernels.ops._triton import precedes, store_ranks

MAX_TOKENS = _triton.MAX_TOKENS


@triton.jit
def sort_key(noise):
    # uint32 that orders as torch.argsort does: -0.0 equals 0.0, and every NaN comes last.
    bits = noise.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    bits = tl.where(magnitude == 0, magnitude, bits)
    key = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(magnitude > 0x7F800000, 0xFFFFFFFF, key).to(tl.uint32)


@triton.jit(do_not_specialize=_triton.SIZES)
def mask_from_noise_kernel(
    noise_ptr,
    shuffle_ptr,
    restore_ptr,
    mask_ptr,
    tokens,
    keep,
    blocks,
    noise_stride,
    SORTED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    # grid:     B * cdiv(N, BLOCK_I); a program ranks BLOCK_I tokens against all tokens of its image
    # in:       noise fp32 [B, N] by stride, last stride 1
    # out:      mask fp32 [B, N]; if not SORTED also ids_shuffle, ids_restore int64 [B, N]; every element written once
    # numerics: integers: rank_i = #{j: (noise_j, j) < (noise_i, i)}, compared as order-preserving uint32
    # bounds:   the tails of i and j are masked; ranks lie in [0, N) by construction; row offsets are int64
    # cost:     N^2 comparisons per image; noise read 1 + cdiv(N, BLOCK_I) times, from L1 and L2
    pid = tl.program_id(0)
    image = pid // blocks
    i = pid % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    row = noise_ptr + image.to(tl.int64) * noise_stride
    key = sort_key(tl.load(row + i, mask=i < tokens, other=0.0))
    before = tl.zeros([BLOCK_I, BLOCK_J], dtype=tl.int32)
    for start in range(0, tokens, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        before += precedes(sort_key(tl.load(row + j, mask=j < tokens, other=0.0)), j, key, i, tokens)
    rank = tl.sum(before, axis=1)
    store_ranks(rank, i, image, tokens, keep, shuffle_ptr, restore_ptr, mask_ptr, SORTED)


def mask_from_noise_fwd(noise: Tensor, keep: int, sorted: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens = noise.shape
    outputs = _triton.mask_outputs(batch, tokens, noise.device)
    if batch == 0 or tokens == 0:
        return outputs
    block_i = min(triton.next_power_of_2(tokens), _triton.RANK_BLOCK)
    blocks = triton.cdiv(tokens, block_i)
    _triton.launch(
        mask_from_noise_kernel,
        batch * blocks,
        noise,
        *(noise, *outputs, tokens, keep, blocks, noise.stride(0)),
        SORTED=sorted,
        BLOCK_I=block_i,
        BLOCK_J=32,
    )
    if sorted:
        _triton.sort_order(outputs, keep)
    return outputs
