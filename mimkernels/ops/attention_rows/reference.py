from __future__ import annotations

from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops.attention import reference


def attention_rows(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    key_mask: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
) -> Tensor:
    _checks.in_range("attention_rows", "rows", rows, q.shape[2])
    reference.check_index("attention_rows", bias_table, bias_index)
    some = None if bias is None else bias[:, :, rows]
    index = None if bias_index is None else bias_index[rows]
    s = reference.scores(q[:, :, rows], k, some, bias_table, index, key_mask, logit_scale, scale)  # [B, H, R, Nk]
    return reference.probabilities(s)
