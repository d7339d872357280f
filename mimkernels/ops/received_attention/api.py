from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._memo import by_signature
from mimkernels.ops.attention.api import checked_lse, checked_scores
from mimkernels.ops.received_attention import reference
from mimkernels.ops.received_attention.spec import SPEC


def received_attention(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    bias: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias_index: Tensor | None = None,
    key_mask: Tensor | None = None,
    logit_scale: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """How much attention each key receives: the mean over queries of ``P_ij``, without the attention matrix.

    Shows attention sinks, and ranks tokens for AttMask or pruning.

    Args:
        q: ``[B, H, Nq, D]`` fp32, fp16 or bf16 (fp64 on the reference).
        k: ``[B, H, Nk, D]``.
        lse: ``[B, H, Nq]`` from ``attention`` with the same biases, ``key_mask``, ``logit_scale`` and ``scale``.
        bias, bias_table, bias_index, key_mask, logit_scale, scale, backend: as in ``attention``.

    Returns:
        ``[B, H, Nk]`` fp32, each row summing to 1 (less where a query may attend nothing). Carries no gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree; the message shows both sides.
        IndexError: ``bias_index`` is out of range (checked on CPU).
        NotImplementedError: no backend takes these inputs; lists each backend's reasons.

    Source: column means of the attention matrix, as in NMI (arXiv:2305.00729) and AttMask (arXiv:2203.12719).
    """
    run, tensors, options = _checked((q, k, lse, bias, bias_table, bias_index, key_mask, logit_scale), scale, backend)
    return run(*tensors, *options)


@by_signature
def _checked(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    key_mask: Tensor | None,
    logit_scale: Tensor | None,
    scale: float | None,
    backend: str,
) -> tuple[Callable[..., Tensor], tuple[Tensor | None, ...], tuple[float]]:
    scored = (bias, bias_table, bias_index, key_mask, logit_scale)
    others, scale = checked_scores("received_attention", q, k, *scored, scale)
    lse = checked_lse("received_attention", lse, q)
    name = SPEC.resolve(backend, q.device, q.dtype, head_dim=q.shape[3])
    run = SPEC.runner(name, reference.received_attention, False)
    tensors = (_checks.rows(q), _checks.rows(k), lse, *others)
    # Nothing here has a gradient.
    return run, tuple(None if tensor is None else tensor.detach() for tensor in tensors), (scale,)
