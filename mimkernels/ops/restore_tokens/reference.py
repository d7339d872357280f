from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops import _checks


def restore_tokens(x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos: Tensor | None, num_prefix: int) -> Tensor:
    batch, tokens = ids_restore.shape
    _checks.in_range("restore_tokens", "ids_restore", ids_restore, tokens)
    prefix, kept = x[:, :num_prefix], x[:, num_prefix:]
    filled = torch.cat([kept, mask_token.expand(batch, tokens - kept.shape[1], -1)], dim=1)
    out = filled.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2]))
    out = torch.cat([prefix, out], dim=1)
    return out if pos is None else out + pos
