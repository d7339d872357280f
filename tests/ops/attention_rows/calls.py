"""Calls of attention_rows, good and refused."""

import torch

Q = torch.randn(1, 2, 6, 8)

CALL = {"q": Q, "k": Q.clone(), "rows": torch.tensor([0, 2]), "bias": torch.randn(1, 6, 6), "scale": 1.0}
LEAST = {"q": Q, "k": Q, "rows": [0]}
REFUSED = [
    ({"rows": [0, 1.5]}, TypeError, "a row must be an int, got float"),
]
