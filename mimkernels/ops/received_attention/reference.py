from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops.attention import reference


def received_attention(
    q: Tensor, k: Tensor, lse: Tensor, bias: Tensor | None, key_mask: Tensor | None, scale: float
) -> Tensor:
    total = torch.zeros(*q.shape[:2], k.shape[2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for first in range(0, q.shape[2], reference.ROWS):
        block = slice(first, first + reference.ROWS)
        some = None if bias is None else bias[:, :, block]
        s = reference.scores(q[:, :, block], k, some, key_mask, scale)
        total = total + reference.log_probabilities(s, lse[:, :, block]).exp().sum(2)
    return total / q.shape[2]
