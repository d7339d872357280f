from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops.attention import reference


def head_divergence(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    key_mask: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
) -> Tensor:
    reference.check_index("head_divergence", bias_table, bias_index)
    batch, heads, length, _ = q.shape
    total = torch.zeros(batch, heads, heads, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for first in range(0, length, reference.ROWS):
        block = slice(first, first + reference.ROWS)
        some = None if bias is None else bias[:, :, block]
        index = None if bias_index is None else bias_index[block]
        s = reference.scores(
            q[:, :, block], k, some, bias_table, index, key_mask, logit_scale, scale
        )  # [B, H, rows, Nk]
        log_p = reference.log_probabilities(s, lse[:, :, block])
        seen = (log_p != float("-inf")).to(s.dtype).flatten(2)
        p = log_p.exp().flatten(2)
        # Divided here: the sum over queries may be infinite where the mean is not.
        log_p = log_p.masked_fill(log_p == float("-inf"), 0.0).flatten(2) / length
        # sum over i, j that both see of P^h (log P^h - log P^g), as two H x H products.
        with _checks.without_autocast(q):
            own = (p * log_p) @ seen.transpose(1, 2)
            crossed = p @ log_p.transpose(1, 2)
        total = total + own - crossed
    return total / min(length, 1)  # NaN as a mean over nothing
