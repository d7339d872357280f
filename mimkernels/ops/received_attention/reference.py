from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops.attention import reference


def received_attention(
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
    reference.check_index("received_attention", bias_table, bias_index)
    total = torch.zeros(*q.shape[:2], k.shape[2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for first in range(0, q.shape[2], reference.ROWS):
        block = slice(first, first + reference.ROWS)
        some = None if bias is None else bias[:, :, block]
        index = None if bias_index is None else bias_index[block]
        s = reference.scores(q[:, :, block], k, some, bias_table, index, key_mask, logit_scale, scale)
        total = total + reference.log_probabilities(s, lse[:, :, block]).exp().sum(2)
    return total / q.shape[2]
