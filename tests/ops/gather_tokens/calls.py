"""Calls of gather_tokens, good and refused."""

import torch

X = torch.randn(2, 6, 8)
IDS = torch.tensor([[0, 3], [5, 1]])

CALL = {"x": X, "ids": IDS, "pos": X[0], "prefix": X[0, :1]}
LEAST = {"x": X, "ids": IDS}
REFUSED = [
    ({"x": X[0]}, ValueError, r"x must have 3 dimensions, got 2 \(\[6, 8\]\)"),
    ({"x": [1, 2]}, TypeError, "x must be a torch.Tensor, got list"),
    ({"x": X.long()}, TypeError, "x must be a floating-point tensor, got torch.int64"),
    ({"ids": IDS.float()}, TypeError, "ids must be int64 or int32, got torch.float32"),
    ({"ids": IDS[0]}, ValueError, "ids must have 2 or 3 dimensions, got 1"),
    ({"ids": IDS[:1]}, ValueError, r"ids \[1, 1, 2\] has size 1 in dimension 1 but x \[2, 6, 8\] has 2"),
    ({"pos": X[0, :5]}, ValueError, r"pos \[5, 8\] has size 5 in dimension 0 but x \[2, 6, 8\] has 6"),
    ({"pos": X[0, :, :7]}, ValueError, r"pos \[6, 7\] has size 7 in dimension 1 but x \[2, 6, 8\] has 8"),
    ({"prefix": X[0, :, :7]}, ValueError, r"prefix \[6, 7\] has size 7 in dimension 1"),
    ({"pos": X}, ValueError, r"pos must have 2 dimensions, got 3 \(\[2, 6, 8\]\)"),
    ({"ids": IDS.to("meta")}, ValueError, "ids is on meta but x is on cpu"),
    ({"backend": None}, TypeError, "backend must be a str, got NoneType"),
]
