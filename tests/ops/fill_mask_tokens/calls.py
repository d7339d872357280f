"""Calls of fill_mask_tokens, good and refused."""

import torch

X = torch.randn(2, 6, 8)
TOKEN = torch.randn(8)
MASK = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 1, 0]])

CALL = {"x": X, "mask": MASK, "mask_token": TOKEN}
LEAST = {"x": X, "mask": torch.ones(2, 6), "mask_token": TOKEN}
REFUSED = [
    ({"mask": torch.ones(2, 5)}, ValueError, r"mask \[2, 5\] and x \[2, 6, 8\] must agree in \[B, N\]"),
    ({"mask_token": X}, ValueError, "mask_token must have 1 dimensions, got 3"),
    ({"mask_token": TOKEN.long()}, TypeError, "mask_token must be a floating-point tensor, got torch.int64"),
]
