from __future__ import annotations

from torch import Tensor

from mimkernels.ops import _pool


def weighted_pool(
    x: Tensor, scores: Tensor, mask: Tensor | None, normalize: bool, num_prefix: int
) -> tuple[Tensor, Tensor]:
    """Pooled tokens ``[B, G, D]`` and the weights ``[B, G, N]``, from scores ``[B, G, N]``; or all without G."""
    if scores.dim() == 2:
        out, weights = weighted_pool(x, scores.unsqueeze(1), mask, normalize, num_prefix)
        return out.squeeze(1), weights.squeeze(1)
    allowed = _pool.allowed_tokens(x, num_prefix, mask)
    if normalize:
        weights = _pool.softmax(scores, allowed)
    else:
        weights = scores if allowed is None else scores.masked_fill(~allowed[:, None], 0.0)
    return _pool.weighted_sum(weights, _pool.without_excluded(x, allowed)), weights
