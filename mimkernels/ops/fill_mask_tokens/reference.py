from __future__ import annotations

import torch
from torch import Tensor


def fill_mask_tokens(x: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    return torch.where(mask[..., None], mask_token, x)
