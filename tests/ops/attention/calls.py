"""Calls of attention, good and refused."""

import torch

Q = torch.randn(1, 2, 6, 8)
OPTIONS = {
    "bias": torch.randn(2, 6, 6),
    "key_mask": torch.ones(1, 6).bool(),
    "scale": 1.0,
    "num_prefix": 1,
    "positions": torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [2.0, 0.0]]),
    "stats": ("entropy", "patch_entropy", "distance", "self_mass"),
}

CALL = {"q": Q, "k": Q.clone(), "v": Q.clone(), **OPTIONS}
VARIANTS = {"attention": {"key_mask": None}}
LEAST = {"q": Q, "k": Q, "v": Q}
REFUSED = [
    ({"scale": torch.tensor(1.0, requires_grad=True)}, TypeError, "scale gets no gradient"),
]
