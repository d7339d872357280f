from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops.attention import reference
from mimkernels.ops.received_attention.reference import ROWS


def head_divergence(
    q: Tensor, k: Tensor, lse: Tensor, bias: Tensor | None, key_mask: Tensor | None, scale: float
) -> Tensor:
    batch, heads, length, _ = q.shape
    total = torch.zeros(batch, heads, heads, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for first in range(0, length, ROWS):
        block = slice(first, first + ROWS)
        some = None if bias is None else bias[:, :, block]
        s = reference.scores(q[:, :, block], k, some, key_mask, scale)  # [B, H, rows, Nk]
        p = reference.probabilities(s, lse[:, :, block])
        level = torch.where(lse[:, :, block] == float("-inf"), 0.0, lse[:, :, block])
        log_p = s.masked_fill(s == float("-inf"), 0.0) - level[..., None]
        # sum over i, j of P^h (log P^h - log P^g): the own term, and an H x H product.
        own = (p * log_p).sum((2, 3))
        with _checks.without_autocast(q):
            crossed = p.flatten(2) @ log_p.flatten(2).transpose(1, 2)
        total = total + own[:, :, None] - crossed
    return total / length
