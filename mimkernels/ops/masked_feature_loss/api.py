from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._memo import by_signature
from mimkernels.ops.masked_feature_loss import reference
from mimkernels.ops.masked_feature_loss.spec import KINDS, SPEC

NORMS = ("ln", "none")


def masked_feature_loss(
    pred: Tensor,
    target: Tensor,
    ids: Tensor | None = None,
    *,
    norm: str = "ln",
    eps: float = 1e-5,
    kind: str = "smooth_l1",
    beta: float = 1.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Loss between predicted and a teacher's features at masked tokens; normalised targets are never stored.

    Args:
        pred: ``[M, D]`` or ``[B, K, D]`` predicted features, fp32, fp16 or bf16 (fp64 on the reference).
        target: ``[B, N, D]`` features of all tokens, of any of these dtypes, whatever that of ``pred``. They get no
            gradient.
        ids: int64 or int32. With ``pred [B, K, D]``: ``[B, K]``, tokens of each image (usually ``ids_masked``). With
            ``pred [M, D]``: ``[M]``, token n of image b as ``b * N + n``, for images of different counts. Tokens may
            be named more than once. None: ``pred [B, N, D]`` holds all tokens.
        norm: ``"ln"``, LayerNorm of each token's target without gain and bias; or ``"none"``.
        eps: added to the variance by ``"ln"``.
        kind: ``"mse"``, ``"l1"`` or ``"smooth_l1"``, means over D; or ``"cosine"``, 1 minus the cosine.
        beta: where smooth L1 turns from square to linear.
        reduction: ``"mean"`` over tokens or ``"none"``.
        backend: ``"auto"`` or a name from ``mimkernels info``. A named backend never falls back.

    Returns:
        fp32 scalar (NaN of no tokens); with ``reduction="none"`` fp32 ``[M]`` or ``[B, K]``; fp64 if an input is. The
        gradient reaches ``pred``.

    Raises:
        ValueError: shapes or devices disagree; the message shows both sides.
        TypeError: a dtype that the op does not take.
        IndexError: an id is out of range (checked on CPU; on CUDA only with ``MIMKERNELS_DEBUG=1``, to avoid a sync).
        NotImplementedError: no backend takes these inputs; lists each backend's reasons.

    Source: MaskDistill, arXiv:2210.10615; of all tokens, feature distillation, arXiv:2205.14141; the same loss serves
    data2vec, arXiv:2202.03555, and with cosines EVA, arXiv:2211.07636.
    """
    run, tensors, (flat, *options) = _checked((pred, target, ids), norm, eps, kind, beta, reduction, backend)
    loss = run(*tensors, *options)
    return loss[0] if flat and reduction == "none" else loss


@by_signature
def _checked(
    pred: Tensor,
    target: Tensor,
    ids: Tensor | None,
    norm: str,
    eps: float,
    kind: str,
    beta: float,
    reduction: str,
    backend: str,
) -> tuple[Callable[..., Tensor], tuple[Tensor, Tensor, Tensor | None], tuple[object, ...]]:
    op = "masked_feature_loss"
    _checks.has_rank(op, "pred", pred, 2, 3)
    _checks.is_float(op, "pred", pred)
    _checks.has_rank(op, "target", target, 3)
    _checks.is_float(op, "target", target)
    _checks.same_device(op, "target", target, "pred", pred)
    _checks.same_size(op, "pred", pred, pred.dim() - 1, "target", target, 2)
    flat = pred.dim() == 2
    if ids is not None:
        ids = _checks.token_ids(op, "ids", ids, (pred.dim() - 1,), "pred", pred)
        if ids.shape != pred.shape[:-1]:
            wanted = "M" if flat else "B, K"
            raise ValueError(f"{op}: ids {_checks.shape(ids)} and pred {_checks.shape(pred)} must agree in [{wanted}]")
    elif pred.shape != target.shape:
        raise ValueError(
            f"{op}: without ids, pred {_checks.shape(pred)} must hold all tokens of target {_checks.shape(target)}"
        )
    if not flat:
        _checks.same_size(op, "pred", pred, 0, "target", target, 0)
    if norm not in NORMS:
        raise ValueError(f"{op}: norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"{op}: reduction must be 'mean' or 'none', got {reduction!r}")
    eps, beta = _checks.positive(op, "eps", eps), _checks.positive(op, "beta", beta)
    options = (flat, norm == "ln", eps, KINDS.index(kind), beta, reduction == "mean")
    # A kernel takes no fp64 on either side.
    dtype = torch.float64 if target.dtype == torch.float64 else pred.dtype
    name = SPEC.resolve(backend, pred.device, dtype)
    run = SPEC.runner(name, reference.masked_feature_loss, _checks.needs_grad(pred))
    pred = _checks.rows(pred[None] if flat else pred)
    ids = ids[None] if flat and ids is not None else ids
    return run, (pred, _checks.rows(target.detach()), ids), options
