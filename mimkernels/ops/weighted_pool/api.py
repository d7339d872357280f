from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

from torch import Tensor

from mimkernels.ops import _checks, _pool
from mimkernels.ops._memo import by_signature
from mimkernels.ops.weighted_pool import reference
from mimkernels.ops.weighted_pool.spec import SPEC


@overload
def weighted_pool(
    x: Tensor,
    scores: Tensor,
    *,
    normalize: bool = ...,
    num_prefix: int = ...,
    mask: Tensor | None = ...,
    return_weights: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def weighted_pool(
    x: Tensor,
    scores: Tensor,
    *,
    normalize: bool = ...,
    num_prefix: int = ...,
    mask: Tensor | None = ...,
    return_weights: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def weighted_pool(
    x: Tensor,
    scores: Tensor,
    *,
    normalize: bool = ...,
    num_prefix: int = ...,
    mask: Tensor | None = ...,
    return_weights: bool = ...,
    backend: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def weighted_pool(
    x: Tensor,
    scores: Tensor,
    *,
    normalize: bool = True,
    num_prefix: int = 0,
    mask: Tensor | None = None,
    return_weights: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Sums of patch tokens weighted by scores computed elsewhere: ``out_bg = sum_n a_bgn x_bn``.

    Args:
        x: ``[B, N, D]`` tokens, fp32, fp16 or bf16 (fp64 on the reference); any strides.
        scores: ``[B, N]`` or ``[B, G, N]``, one per token (prefix tokens too: theirs count nothing), any float dtype.
        normalize: the weights a are the softmax of the scores over the allowed tokens; else the scores as given.
        num_prefix: how many leading tokens ([cls], registers) are never pooled.
        mask: ``[B, N]`` bool, True = may be pooled; or None. An excluded token is not looked at: its NaN reach
            nothing and its gradient is zero. An image without allowed tokens gets zeros, as do scores that are all
            -inf.
        return_weights: also return the weights.
        backend: ``"auto"`` or a name from ``mimkernels info``. A named backend never falls back.

    Returns:
        ``[B, D]`` for 2-D scores, else ``[B, G, D]``, dtype of ``x``; with ``return_weights`` a pair of that and the
        weights in the shape of the scores, fp32, zero on excluded tokens. Gradients flow from both to ``x`` and
        ``scores``.

    Raises:
        ValueError: shapes or devices disagree; the message shows both sides.
        TypeError: a dtype that the op does not take.
        NotImplementedError: no backend takes these inputs; lists each backend's reasons.

    Source: attention-based multiple instance learning, arXiv:1802.04712; poolings of arXiv:2412.03215.
    """
    _checks.boolean("weighted_pool", "return_weights", return_weights)
    run, tensors, options = _checked((x, scores, mask), normalize, num_prefix, backend)
    out, weights = run(*tensors, *options)
    return (out, weights) if return_weights else out


@by_signature
def _checked(
    x: Tensor, scores: Tensor, mask: Tensor | None, normalize: bool, num_prefix: int, backend: str
) -> tuple[Callable[..., tuple[Tensor, Tensor]], tuple[Tensor, Tensor, Tensor | None], tuple[bool, int]]:
    op = "weighted_pool"
    mask = _pool.tokens_and_mask(op, x, num_prefix, mask)
    _checks.boolean(op, "normalize", normalize)
    _checks.has_rank(op, "scores", scores, 2, 3)
    _checks.is_float(op, "scores", scores)
    _checks.same_device(op, "scores", scores, "x", x)
    _checks.same_size(op, "scores", scores, 0, "x", x, 0)
    _checks.same_size(op, "scores", scores, scores.dim() - 1, "x", x, 1)
    scores = scores.to(_pool.wide(x))
    name = SPEC.resolve(backend, x.device, x.dtype)
    run = SPEC.runner(name, reference.weighted_pool, _checks.needs_grad(x, scores))
    return run, (_checks.rows(x), _checks.rows(scores), mask), (normalize, num_prefix)
