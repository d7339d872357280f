from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_layer_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    drop: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The residual is rounded to its dtype before it is normalised, as where the two are computed apart."""
    residual = x
    if y is not None:
        if scale is not None:
            y = y * scale
        if drop is not None:
            y = y * drop[:, None, None]
        residual = (x + y).to(x.dtype)
    wide = residual.to(torch.promote_types(x.dtype, torch.float32))
    return residual, F.layer_norm(wide, wide.shape[-1:], weight, bias, eps).to(out_dtype)
