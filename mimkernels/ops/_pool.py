"""What the pooling ops share: the checks of their common arguments, and the plain expression of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops import _checks


def tokens_and_mask(op: str, x: Tensor, num_prefix: int, mask: Tensor | None) -> Tensor | None:
    """Check the tokens ``[B, N, D]`` and which of them may be pooled; the mask as kernels take it."""
    _checks.has_rank(op, "x", x, 3)
    _checks.is_float(op, "x", x)
    _checks.prefix_count(op, num_prefix, x.shape[1])
    if mask is None:
        return None
    _checks.is_tensor(op, "mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool (True = may be pooled), got {mask.dtype}")
    return _checks.token_mask(op, mask, "x", x)


def wide(x: Tensor) -> torch.dtype:
    """The dtype of scores, weights and sums over tokens: fp32, or fp64 for fp64 tokens."""
    return torch.promote_types(x.dtype, torch.float32)


def allowed_tokens(x: Tensor, num_prefix: int, mask: Tensor | None) -> Tensor | None:
    """Which tokens may be pooled, bool ``[B or 1, N]``; None where all may."""
    if num_prefix == 0:
        return mask
    patch = (torch.arange(x.shape[1], device=x.device) >= num_prefix)[None]
    return patch if mask is None else patch & mask


def without_excluded(x: Tensor, allowed: Tensor | None) -> Tensor:
    """The tokens with zeros for those that may not be pooled, so that their NaN reach nothing."""
    return x if allowed is None else x.masked_fill(~allowed[..., None], 0.0)


def softmax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Softmax of ``[B, G, N]`` over the allowed tokens; zeros elsewhere, and where every allowed score is -inf."""
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    nothing = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    return weights if allowed is None else weights.masked_fill(~allowed[:, None], 0.0)


def nothing_pooled(tokens: Tensor, weights: Tensor, needed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """For backward where the weights alone are used: a gradient and tokens without columns, and what tokens get.

    A gradient of zeros in their place would be NaN beside weights and tokens that are not finite.

    Args:
        tokens: ``[B, N, D]``, what was pooled.
        weights: ``[B, G, N]`` or ``[B, N]``.
        needed: whether the tokens want a gradient.
    """
    without_columns = tokens.new_empty((*weights.shape[:-1], 0)), tokens.new_empty((*tokens.shape[:-1], 0))
    return *without_columns, tokens.new_zeros(tokens.shape) if needed else None


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """``[B, G, N]`` weights of ``[B, N, D]`` tokens: ``[B, G, D]`` in the dtype of the tokens."""
    with _checks.without_autocast(values):
        return weights.to(values.dtype) @ values
