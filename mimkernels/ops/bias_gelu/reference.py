from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """A bias in fp32 beside half-precision x is added in fp32, which torch's promotion does."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh" if tanh else "none").to(x.dtype)
