"""Calls of head_divergence, good and refused."""

import torch

Q = torch.randn(1, 2, 6, 8)

CALL = {"q": Q, "k": Q.clone(), "lse": torch.randn(1, 2, 6), "bias": torch.randn(1, 6, 6), "scale": 1.0}
