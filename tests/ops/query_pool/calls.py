"""Calls of query_pool, good and refused."""

import torch

X = torch.randn(2, 6, 8)
TOKEN = torch.randn(8)

CALL = {
    "x": X,
    "queries": X[0, :2],
    "values": X.clone(),
    "mask": torch.ones(2, 6).bool(),
    "scale": 1.0,
    "num_prefix": 1,
    "sliced": False,
}
VARIANTS = {
    "query_pool": {"mask": None, "return_weights": True},
    "query_pool-sliced": {"mask": None, "return_weights": True, "values": None, "sliced": True},
}
LEAST = {"x": X, "queries": TOKEN[None]}
REFUSED = [
    ({"x": X[0]}, ValueError, r"x must have 3 dimensions, got 2 \(\[6, 8\]\)"),
    ({"x": X.long()}, TypeError, "x must be a floating-point tensor, got torch.int64"),
    ({"queries": TOKEN}, ValueError, r"queries must have 2 or 3 dimensions, got 1"),
    ({"queries": TOKEN[None, :7]}, ValueError, r"queries \[1, 7\] has size 7 in dimension 1 but x"),
    ({"queries": X[:1]}, ValueError, r"queries \[1, 6, 8\] has size 1 in dimension 0 but x"),
    ({"values": X[:, :5]}, ValueError, r"values \[2, 5, 8\] has size 5 in dimension 1 but x"),
    ({"values": X.bfloat16()}, TypeError, "values are torch.bfloat16 but x is torch.float32"),
    ({"queries": X[0, :3], "sliced": True}, ValueError, "3 queries do not cut the 8 columns"),
    ({"num_prefix": 7}, ValueError, "num_prefix is 7 but there are 6 tokens"),
    ({"num_prefix": -1}, ValueError, "num_prefix is -1 but there are 6 tokens"),
    ({"mask": torch.ones(2, 6)}, TypeError, "mask must be bool .True = may be pooled., got torch.float32"),
    ({"mask": torch.ones(2, 5).bool()}, ValueError, r"mask \[2, 5\] and x \[2, 6, 8\] must agree"),
]
