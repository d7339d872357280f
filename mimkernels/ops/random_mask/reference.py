from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops import _token_mask

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def random_mask(
    seed: int,
    offset: int,
    step: Tensor | None,
    batch: int,
    tokens: int,
    keep: int,
    in_order: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    keys = noise(seed, offset, step, batch, tokens, device)
    return _token_mask.from_keys(keys, keep, in_order)


def noise(seed: int, offset: int, step: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor:
    """``[batch, tokens]`` int64 in [0, 2^32): word i % 4 of Philox4x32-10 at counter (i // 4, b, offset)."""
    position = torch.zeros((), dtype=torch.int64, device=device) + offset
    if step is not None:
        position = position + step
    groups = torch.arange((tokens + 3) // 4, dtype=torch.int64, device=device)
    images = torch.arange(batch, dtype=torch.int64, device=device)[:, None]
    counter = [
        groups.expand(batch, -1),
        images.expand(-1, groups.shape[0]),
        position & _WORD,
        position >> 32 & _WORD,
    ]
    words = philox4x32(counter, (seed & _WORD, seed >> 32 & _WORD))
    return torch.stack(words, dim=-1).flatten(1)[:, :tokens]


def philox4x32(counter: list[Tensor], key: tuple[int, int], rounds: int = 10) -> list[Tensor]:
    """Philox4x32 (Salmon et al., SC 2011) on 32-bit words held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return list(torch.broadcast_tensors(c0, c1, c2, c3))


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    # The 64-bit product of two 32-bit words does not fit int64: multiply by halves of b.
    low_half = a * (b & 0xFFFF)
    high_half = a * (b >> 16) + (low_half >> 16)
    return high_half >> 16, (high_half & 0xFFFF) << 16 | low_half & 0xFFFF
