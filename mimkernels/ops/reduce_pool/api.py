from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mimkernels.ops import _checks, _pool
from mimkernels.ops._memo import by_signature
from mimkernels.ops.reduce_pool import reference
from mimkernels.ops.reduce_pool.spec import KINDS, SPEC


def reduce_pool(
    x: Tensor,
    kind: str,
    *,
    num_prefix: int = 0,
    mask: Tensor | None = None,
    p: float | Tensor = 3.0,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Mean, maximum or generalised mean (GeM) of the patch tokens, column by column.

    Args:
        x: ``[B, N, D]`` tokens, fp32, fp16 or bf16 (fp64 on the reference); any strides.
        kind: ``"mean"``; ``"max"`` (of equal maxima the first token gets the gradient); or ``"gem"``:
            ``(mean_n max(x_bn, eps)^p)^(1/p)``; 0, without a gradient, where every power is below what fp32 holds, as
            is 1e-6 to the power of 7.5 and more.
        num_prefix: how many leading tokens ([cls], registers) are never pooled.
        mask: ``[B, N]`` bool, True = may be pooled; or None. An excluded token is not looked at: its NaN reach
            nothing and its gradient is zero. An image without allowed tokens gets zeros.
        p: exponent of GeM, a number or a tensor of one element; the tensor gets a gradient.
        eps: what GeM raises smaller features to; positive.
        backend: ``"auto"`` or a name from ``mimkernels info``. A named backend never falls back.

    Returns:
        ``[B, D]``, dtype of ``x``. Gradients reach ``x`` and ``p``.

    Raises:
        ValueError: shapes or devices disagree, or an unknown kind; the message shows both sides.
        TypeError: a dtype that the op does not take.
        NotImplementedError: no backend takes these inputs; lists each backend's reasons.

    Source: GeM, arXiv:1711.02512.
    """
    power, number = (p, 1.0) if isinstance(p, Tensor) else (None, p)
    run, (x, mask, power), (index, num_prefix, made, eps) = _checked(
        (x, mask, power), kind, num_prefix, number, eps, backend
    )
    out = run(x, mask, index, num_prefix, power if made is None else made, eps)
    return out if isinstance(out, Tensor) else out[0]  # kernels also return what backward needs


@by_signature
def _checked(
    x: Tensor,
    mask: Tensor | None,
    p: Tensor | None,
    kind: str,
    num_prefix: int,
    number: float,
    eps: float,
    backend: str,
) -> tuple[
    Callable[..., Tensor | tuple[Tensor, Tensor]],
    tuple[Tensor, Tensor | None, Tensor | None],
    tuple[int, int, Tensor | None, float],
]:
    op = "reduce_pool"
    mask = _pool.tokens_and_mask(op, x, num_prefix, mask)
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    made = None  # the exponent, where it is a number
    if kind != "gem":
        p = None
    elif p is not None:
        p = _exponent(op, p, x)
    else:
        made = torch.full((1,), _checks.positive(op, "p", number), dtype=_pool.wide(x), device=x.device)
    eps = _checks.positive(op, "eps", eps)
    name = SPEC.resolve(backend, x.device, x.dtype)
    run = SPEC.runner(name, reference.reduce_pool, _checks.needs_grad(x, p))
    return run, (_checks.rows(x), mask, p), (KINDS.index(kind), num_prefix, made, eps)


def _exponent(op: str, p: Tensor, x: Tensor) -> Tensor:
    """The exponent as one element ``[1]``, fp32 or fp64."""
    _checks.is_tensor(op, "p", p)
    _checks.is_float(op, "p", p)
    _checks.same_device(op, "p", p, "x", x)
    if p.numel() != 1:
        raise ValueError(f"{op}: p must have one element, got shape {_checks.shape(p)}")
    return p.reshape(1).to(_pool.wide(x))
