from __future__ import annotations

from torch import Tensor

from mimkernels.ops import _checks, _pool


def query_pool(
    x: Tensor, queries: Tensor, values: Tensor | None, mask: Tensor | None, scale: float, num_prefix: int, sliced: bool
) -> tuple[Tensor, Tensor]:
    """Pooled tokens ``[B, G, Dv]`` (``[B, G, Dv / G]`` sliced) and the weights ``[B, G, N]``."""
    wide = _pool.wide(x)
    allowed = _pool.allowed_tokens(x, num_prefix, mask)
    x = _pool.without_excluded(x, allowed)
    values = x if values is None else _pool.without_excluded(values, allowed)
    with _checks.without_autocast(x):
        scores = scale * (queries.to(wide) @ x.to(wide).transpose(1, 2))  # [B, G, N]
    weights = _pool.softmax(scores, allowed)
    if not sliced:
        return _pool.weighted_sum(weights, values), weights
    groups = weights.shape[1]
    slices = values.unflatten(2, (groups, values.shape[2] // groups)).transpose(1, 2)  # [B, G, N, Dv / G]
    with _checks.without_autocast(x):
        return (weights.to(values.dtype)[:, :, None] @ slices).squeeze(2), weights
