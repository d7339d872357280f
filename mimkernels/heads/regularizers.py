"""Row statistics as terms of a loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mimkernels.heads.derived import query_mean
from mimkernels.ops.attention.spec import DETACHED, STATISTICS

__all__ = ["parse_regularizers", "regularization_loss"]

DIFFERENTIABLE = tuple(name for name in STATISTICS if name not in DETACHED)


def parse_regularizers(terms: str | Iterable[str]) -> dict[str, float]:
    """Weights of a regulariser from text such as ``["entropy=1e-3", "distance=-1e-4"]``.

    Args:
        terms: ``name=weight`` each, or one string of them separated by commas. A positive weight makes training lower
            the statistic, a negative one raise it.

    Returns:
        weights by statistic, in order; their names are what to ask of ``attention(..., stats=...)``.

    Raises:
        ValueError: not of that form, a statistic that is unknown, has no gradient or comes twice, or a weight that is
            not a finite number.
    """
    weights: dict[str, float] = {}
    if not isinstance(terms, Iterable):
        raise TypeError(f"regularisers must be name=weight, one or several, got {type(terms).__name__}")
    for term in terms.split(",") if isinstance(terms, str) else terms:
        if not isinstance(term, str):
            raise TypeError(f"a regulariser must be a str name=weight, got {type(term).__name__}")
        name, equals, number = (part.strip() for part in term.partition("="))
        if not equals:
            raise ValueError(f"regulariser {term!r} must be name=weight, such as entropy=1e-3")
        _check_name(name)
        if name in weights:
            raise ValueError(f"regulariser {name!r} is given twice")
        try:
            weights[name] = float(number)
        except ValueError:
            raise ValueError(f"regulariser {term!r}: {number!r} is not a number") from None
        if not math.isfinite(weights[name]):
            raise ValueError(f"regulariser {term!r}: the weight must be finite")
    return weights


def _check_name(name: str) -> None:
    if name in DETACHED:
        raise ValueError(f"regulariser {name!r} has no gradient; with one: {', '.join(DIFFERENTIABLE)}")
    if name not in DIFFERENTIABLE:
        raise ValueError(f"unknown regulariser {name!r}; known: {', '.join(DIFFERENTIABLE)}")


def regularization_loss(
    weights: Mapping[str, float],
    stats: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    *,
    num_prefix: int = 0,
) -> Tensor:
    """What to add to the loss: sum over statistics of weight times its mean over layers, images, heads, patch queries.

    Args:
        weights: from ``parse_regularizers``.
        stats: the statistics that ``attention`` returned, each ``[B, H, N]``; a sequence of them for several layers.
        num_prefix: leading tokens that are no patches; their queries are left out.

    Returns:
        fp32 scalar with gradients to q, k and bias of the attention.

    Raises:
        ValueError: an unknown statistic, one that was not captured, or no layer.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must be numbers by statistic, got {type(weights).__name__}")
    layers = [stats] if isinstance(stats, Mapping) else list(stats) if isinstance(stats, Sequence) else [stats]
    for layer in layers:
        if not isinstance(layer, Mapping):
            raise TypeError(f"stats must be tensors by statistic, or a sequence of those, got {type(layer).__name__}")
    if not layers:
        raise ValueError("a regulariser needs the statistics of at least one layer, got none")
    terms = []
    for name, weight in weights.items():
        _check_name(name)
        for layer in layers:
            if name not in layer:
                raise ValueError(f"the regulariser needs {name}, captured: {', '.join(layer) or 'none'}")
            terms.append(query_mean(layer[name], num_prefix).mean() * (weight / len(layers)))
    return torch.stack(terms).sum() if terms else torch.zeros(())
