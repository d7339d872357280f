"""Calls of received_attention, good and refused."""

import torch

Q = torch.randn(1, 2, 6, 8)

CALL = {
    "q": Q,
    "k": Q.clone(),
    "lse": torch.randn(1, 2, 6),
    "bias": torch.randn(1, 6, 6),
    "bias_table": torch.randn(9, 2),
    "bias_index": torch.arange(36).view(6, 6) % 9,
    "logit_scale": None,
    "scale": 1.0,
}
