"""Calls of weighted_pool, good and refused."""

import torch

X = torch.randn(2, 6, 8)
IDS = torch.tensor([[0, 3], [5, 1]])

CALL = {
    "x": X,
    "scores": X[..., 0],
    "mask": torch.ones(2, 6).bool(),
    "num_prefix": 1,
    "normalize": True,
}
VARIANTS = {"weighted_pool": {"mask": None}}
LEAST = {"x": X, "scores": X[..., 0]}
REFUSED = [
    ({"scores": X[:1, :, 0]}, ValueError, r"scores \[1, 6\] has size 1 in dimension 0 but x"),
    ({"scores": X[:, :5, 0]}, ValueError, r"scores \[2, 5\] has size 5 in dimension 1 but x"),
    ({"scores": X[0, 0]}, ValueError, "scores must have 2 or 3 dimensions, got 1"),
    ({"scores": IDS}, TypeError, "scores must be a floating-point tensor, got torch.int64"),
]
