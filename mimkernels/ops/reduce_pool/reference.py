from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops import _pool
from mimkernels.ops.reduce_pool.spec import KINDS


def reduce_pool(x: Tensor, mask: Tensor | None, kind: int, num_prefix: int, p: Tensor | None, eps: float) -> Tensor:
    allowed = _pool.allowed_tokens(x, num_prefix, mask)
    if allowed is None:
        allowed = torch.ones((1, x.shape[1]), dtype=torch.bool, device=x.device)
    count = allowed.sum(1, keepdim=True)  # [B or 1, 1]
    nothing = count == 0
    if KINDS[kind] == "max":
        if x.shape[1] == 0:
            return x.new_zeros((x.shape[0], x.shape[2]))
        # torch.max, not amax: of equal maxima the first token gets the gradient. Where all are -inf, the first of them
        # that may be pooled.
        most, index = x.detach().masked_fill(~allowed[..., None], float("-inf")).max(1)
        first = allowed.to(torch.uint8).argmax(1)[:, None]
        index = torch.where(most == float("-inf"), first, index)
        return x.gather(1, index[:, None]).squeeze(1).masked_fill(nothing, 0.0)
    count = count.clamp(min=1)
    if KINDS[kind] == "mean":
        return (_pool.without_excluded(x, allowed).sum(1, dtype=_pool.wide(x)) / count).to(x.dtype)
    x = _pool.without_excluded(x, allowed)
    x = x.to(_pool.wide(x))
    assert p is not None
    # Not clamp, whose gradient at x == eps differs between versions of torch.
    powers = torch.where(x < eps, eps, x).pow(p)
    moment = _pool.without_excluded(powers, allowed).sum(1) / count
    nothing = nothing | (moment == 0)  # all powers are below what the dtype holds
    return moment.masked_fill(nothing, 1.0).pow(1.0 / p).masked_fill(nothing, 0.0).to(x.dtype)
