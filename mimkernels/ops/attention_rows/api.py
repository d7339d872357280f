from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops.attention.api import checked_scores
from mimkernels.ops.attention_rows import reference


def attention_rows(
    q: Tensor,
    k: Tensor,
    rows: Tensor | Sequence[int],
    *,
    bias: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias_index: Tensor | None = None,
    key_mask: Tensor | None = None,
    logit_scale: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The attention maps of chosen queries, such as [cls]; only those rows are computed.

    R x N outputs from R x D queries are a small GEMM and one exponential: plain torch on every device, no kernels.

    Args:
        q: ``[B, H, Nq, D]`` fp32, fp16 or bf16 (fp64 on the reference).
        k: ``[B, H, Nk, D]``.
        rows: R query indices in ``[0, Nq)``, a sequence or an int64 ``[R]`` tensor.
        bias, bias_table, bias_index, key_mask, logit_scale, scale: as in ``attention``.

    Returns:
        ``[B, H, R, Nk]`` fp32 attention probabilities. Gradients reach ``q``, ``k``, ``bias``,
        ``bias_table`` and ``logit_scale``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree; the message shows both sides.
        IndexError: a row, or ``bias_index``, is out of range (checked on CPU).

    Source: [cls] attention maps as in DINO, arXiv:2104.14294; Beyond-[cls], arXiv:2412.03215.
    """
    scored = (bias, bias_table, bias_index, key_mask, logit_scale)
    others, scale = checked_scores("attention_rows", q, k, *scored, scale)
    if not isinstance(rows, Tensor):
        if not isinstance(rows, Iterable):
            raise TypeError(f"attention_rows: rows must be a tensor or a sequence of integers, got {rows!r}")
        rows = [_checks.integer("attention_rows", "a row", row) for row in rows]
        rows = _checks.numbers_on(rows, torch.int64, q.device)
    rows = _checks.token_ids("attention_rows", "rows", rows, (1,), "q", q)
    return reference.attention_rows(q, k, rows, *others, scale)
