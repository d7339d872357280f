"""Calls of reduce_pool, good and refused."""

import math

import torch

X = torch.randn(2, 6, 8)
TOKEN = torch.randn(8)

CALL = {
    "x": X,
    "kind": "gem",
    "mask": torch.ones(2, 6).bool(),
    "num_prefix": 1,
    "p": torch.tensor([3.0]),
    "eps": 1e-6,
}
NUMBERS = {"p": 3.0}
VARIANTS = {
    f"reduce_pool-{kind}": {"kind": kind, "mask": None, "p": p}
    for kind, p in (("mean", 3.0), ("max", 3.0), ("gem", CALL["p"]))
}
LEAST = {"x": X, "kind": "mean"}
REFUSED = [
    ({"kind": "sum"}, ValueError, "kind must be one of mean, max, gem, got 'sum'"),
    ({"kind": "gem", "p": 0.0}, ValueError, "p must be positive, got 0.0"),
    ({"kind": "gem", "p": TOKEN}, ValueError, r"p must have one element, got shape \[8\]"),
    ({"kind": "gem", "eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
    ({"num_prefix": 7}, ValueError, "num_prefix is 7 but there are 6 tokens"),
    ({"kind": "mean", "eps": math.nan}, ValueError, "eps must be finite, got nan"),
]
