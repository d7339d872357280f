from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """A bias in fp32 beside half-precision x is added in fp32, which torch's promotion does."""
    return F.gelu(x if bias is None else x + bias, approximate=approximate).to(x.dtype)
