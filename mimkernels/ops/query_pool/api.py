from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

from torch import Tensor

from mimkernels.ops import _checks, _pool
from mimkernels.ops._memo import by_signature
from mimkernels.ops.query_pool import reference
from mimkernels.ops.query_pool.spec import SPEC


@overload
def query_pool(
    x: Tensor,
    queries: Tensor,
    *,
    values: Tensor | None = ...,
    scale: float | None = ...,
    num_prefix: int = ...,
    mask: Tensor | None = ...,
    sliced: bool = ...,
    return_weights: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def query_pool(
    x: Tensor,
    queries: Tensor,
    *,
    values: Tensor | None = ...,
    scale: float | None = ...,
    num_prefix: int = ...,
    mask: Tensor | None = ...,
    sliced: bool = ...,
    return_weights: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def query_pool(
    x: Tensor,
    queries: Tensor,
    *,
    values: Tensor | None = ...,
    scale: float | None = ...,
    num_prefix: int = ...,
    mask: Tensor | None = ...,
    sliced: bool = ...,
    return_weights: bool = ...,
    backend: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def query_pool(
    x: Tensor,
    queries: Tensor,
    *,
    values: Tensor | None = None,
    scale: float | None = None,
    num_prefix: int = 0,
    mask: Tensor | None = None,
    sliced: bool = False,
    return_weights: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attentive pooling: each query's softmax over the patch tokens, and the sum of the tokens it weighs.

    With ``a_bgn`` = softmax over the allowed tokens n of ``scale * (q_g . x_bn)``, ``out_bg = sum_n a_bgn v_bn``, where
    the values v are the tokens themselves unless given. A bias of the scores, as that of ``Linear(D, 1)``, changes
    nothing: it cancels in the softmax.

    Args:
        x: ``[B, N, D]`` tokens, fp32, fp16 or bf16 (fp64 on the reference); any strides.
        queries: ``[G, D]``, or ``[B, G, D]`` for queries of each image; taken in the dtype of ``x``.
        values: ``[B, N, Dv]`` pooled instead of ``x``, same dtype; or None.
        scale: of the scores; ``D ** -0.5`` if None. 1 for ``Linear(D, 1)`` scores.
        num_prefix: how many leading tokens ([cls], registers) are never pooled.
        mask: ``[B, N]`` bool, True = may be pooled; or None. An excluded token is not looked at: its NaN reach
            nothing and its gradient is zero. An image without allowed tokens gets zeros.
        sliced: query g pools only columns ``[g * Dv / G, (g + 1) * Dv / G)`` of the values; G must divide Dv.
        return_weights: also return the weights.
        backend: ``"auto"`` or a name from ``mimkernels info``. A named backend never falls back.

    Returns:
        ``[B, G, Dv]``, or ``[B, G, Dv / G]`` if ``sliced`` (``flatten(1)`` concatenates the slices), dtype of ``x``;
        with ``return_weights`` a pair of that and the weights ``[B, G, N]``, fp32, zero on excluded tokens.
        Gradients flow from both to ``x``, ``queries`` and ``values``.

    Raises:
        ValueError: shapes or devices disagree; the message shows both sides.
        TypeError: a dtype that the op does not take.
        NotImplementedError: no backend takes these inputs; lists each backend's reasons.

    Source: AbMILP of depth 1 (arXiv:1802.04712, arXiv:2412.03215), attentive probes with a learned query (CAE, MAP),
    efficient probing (sliced values, arXiv:2506.10178).
    """
    _checks.boolean("query_pool", "return_weights", return_weights)
    run, tensors, options = _checked((x, queries, values, mask), scale, num_prefix, sliced, backend)
    out, weights = run(*tensors, *options)
    return (out, weights) if return_weights else out


@by_signature
def _checked(
    x: Tensor,
    queries: Tensor,
    values: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
    num_prefix: int,
    sliced: bool,
    backend: str,
) -> tuple[
    Callable[..., tuple[Tensor, Tensor]], tuple[Tensor, Tensor, Tensor | None, Tensor | None], tuple[float, int, bool]
]:
    op = "query_pool"
    mask = _pool.tokens_and_mask(op, x, num_prefix, mask)
    queries = _check_queries(op, queries, x)
    groups = queries.shape[-2]
    if values is not None:
        values = _check_values(op, values, x)
    width = x.shape[2] if values is None else values.shape[2]
    if _checks.boolean(op, "sliced", sliced) and (groups == 0 or width % groups):
        raise ValueError(f"{op}: {groups} queries do not cut the {width} columns of the values into equal slices")
    scale = _checks.head_scale(op, scale, x.shape[2])
    name = SPEC.resolve(backend, x.device, x.dtype)
    run = SPEC.runner(name, reference.query_pool, _checks.needs_grad(x, queries, values))
    values = None if values is None else _checks.rows(values)
    return run, (_checks.rows(x), _checks.rows(queries), values, mask), (scale, num_prefix, sliced)


def _check_queries(op: str, queries: Tensor, x: Tensor) -> Tensor:
    _checks.has_rank(op, "queries", queries, 2, 3)
    _checks.is_float(op, "queries", queries)
    _checks.same_device(op, "queries", queries, "x", x)
    _checks.same_size(op, "queries", queries, queries.dim() - 1, "x", x, 2)
    if queries.dim() == 3:
        _checks.same_size(op, "queries", queries, 0, "x", x, 0)
    return queries.to(x.dtype)


def _check_values(op: str, values: Tensor, x: Tensor) -> Tensor:
    _checks.has_rank(op, "values", values, 3)
    _checks.same_device(op, "values", values, "x", x)
    if values.dtype != x.dtype:
        raise TypeError(f"{op}: values are {values.dtype} but x is {x.dtype}")
    _checks.same_size(op, "values", values, 0, "x", x, 0)
    _checks.same_size(op, "values", values, 1, "x", x, 1)
    return values
