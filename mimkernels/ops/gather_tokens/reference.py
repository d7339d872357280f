from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops import _checks


def gather_tokens(x: Tensor, ids: Tensor, pos: Tensor | None, prefix: Tensor | None) -> Tensor:
    _checks.in_range("gather_tokens", "ids", ids, x.shape[1])
    ids = _checks.as_masks(ids)
    masks, batch, keep = ids.shape
    index = ids[..., None].expand(masks, batch, keep, x.shape[2])
    out = x.expand(masks, *x.shape).gather(2, index).flatten(0, 1)  # [M*B, K, D]
    if pos is not None:
        out = out + pos[ids.flatten(0, 1)]
    if prefix is not None:
        out = torch.cat([prefix.expand(masks * batch, *prefix.shape), out], dim=1)
    return out
