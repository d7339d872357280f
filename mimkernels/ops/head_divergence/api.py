from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._memo import by_signature
from mimkernels.ops.attention.api import checked_lse, checked_scores
from mimkernels.ops.head_divergence import reference
from mimkernels.ops.head_divergence.spec import SPEC


def head_divergence(
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
    """How differently the heads of a layer attend: mean over queries of ``KL(P^h || P^g)``, in nats.

    Args:
        q: ``[B, H, Nq, D]`` fp32, fp16 or bf16 (fp64 on the reference).
        k: ``[B, H, Nk, D]``.
        lse: ``[B, H, Nq]`` from ``attention`` with the same biases, ``key_mask``, ``logit_scale`` and ``scale``.
        bias, bias_table, bias_index, key_mask, logit_scale, scale, backend: as in ``attention``. A key that the bias
            hides (-inf) from one of two heads, which would make their divergence infinite, is left out of its sum,
            which may then be below 0.

    Returns:
        ``[B, H, H]`` fp32: entry (h, g) is ``KL(P^h || P^g)``, 0 on the diagonal. Carries no gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree; the message shows both sides.
        IndexError: ``bias_index`` is out of range (checked on CPU).
        NotImplementedError: no backend takes these inputs; lists each backend's reasons.

    Source: the head diversity of "Revealing the Dark Secrets of Masked Image Modeling", arXiv:2205.13543.
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
    others, scale = checked_scores("head_divergence", q, k, *scored, scale)
    lse = checked_lse("head_divergence", lse, q)
    name = SPEC.resolve(backend, q.device, q.dtype, head_dim=q.shape[3])
    run = SPEC.runner(name, reference.head_divergence, False)
    tensors = (_checks.rows(q), _checks.rows(k), lse, *others)
    # Nothing here has a gradient.
    return run, tuple(None if tensor is None else tensor.detach() for tensor in tensors), (scale,)
