from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._memo import by_signature
from mimkernels.ops.gather_tokens import reference
from mimkernels.ops.gather_tokens.spec import SPEC


def gather_tokens(
    x: Tensor,
    ids: Tensor,
    *,
    pos: Tensor | None = None,
    prefix: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Prefix tokens, then the kept tokens plus their positions, in one pass.

    Args:
        x: ``[B, N, D]`` tokens, fp32, fp16 or bf16 (fp64 on the reference); any strides.
        ids: ``[B, K]`` or ``[M, B, K]`` int64 or int32, each in ``[0, N)``. M masks share one ``x``.
        pos: ``[N, D]`` or ``[1, N, D]`` positions added to the kept tokens, or None.
        prefix: ``[P, D]`` or ``[1, P, D]`` tokens put first, positions already added, or None.
        backend: ``"auto"`` or a name from ``mimkernels info``. A named backend never falls back.

    Returns:
        ``[B, P + K, D]`` (``[M * B, P + K, D]`` for M masks), dtype of ``x``. Gradients reach ``x``, ``pos`` and
        ``prefix``; a token kept by several masks sums their gradients, in order.

    Raises:
        ValueError: shapes or devices disagree; the message shows both sides.
        TypeError: a dtype that the op does not take.
        IndexError: an id is out of range (checked on CPU; on CUDA only with ``MIMKERNELS_DEBUG=1``, to avoid a sync).
        NotImplementedError: no backend takes these inputs; lists each backend's reasons.

    Source: the visible-token gather of MAE, arXiv:2111.06377.
    """
    run, tensors, _ = _checked((x, ids, pos, prefix), backend)
    return run(*tensors)


@by_signature
def _checked(
    x: Tensor, ids: Tensor, pos: Tensor | None, prefix: Tensor | None, backend: str
) -> tuple[Callable[..., Tensor], tuple[Tensor, Tensor, Tensor | None, Tensor | None], tuple[()]]:
    op = "gather_tokens"
    _checks.has_rank(op, "x", x, 3)
    _checks.is_float(op, "x", x)
    ids = _checks.token_ids(op, "ids", ids, (2, 3), "x", x)
    _checks.one_per_image(op, "ids", ids, "x", x)
    if pos is not None:
        pos = _checks.parameter(op, "pos", pos, 2, "x", x)
        _checks.same_size(op, "pos", pos, 0, "x", x, 1)
        _checks.same_size(op, "pos", pos, 1, "x", x, 2)
    if prefix is not None:
        prefix = _checks.parameter(op, "prefix", prefix, 2, "x", x)
        _checks.same_size(op, "prefix", prefix, 1, "x", x, 2)
    name = SPEC.resolve(backend, x.device, x.dtype)
    run = SPEC.runner(name, reference.gather_tokens, _checks.needs_grad(x, pos, prefix))
    return run, (_checks.rows(x), ids, pos, prefix), ()
