"""Calls of bias_gelu, good and refused."""

import torch

X = torch.randn(2, 6, 8)
TOKEN = torch.randn(8)

CALL = {"x": X, "bias": TOKEN}
LEAST = {"x": X, "bias": TOKEN}
REFUSED = [
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ({"x": X.long()}, TypeError, "x must be a floating-point tensor, got torch.int64"),
    ({"x": X[0, 0, 0]}, ValueError, r"x must have at least 1 dimension, got 0 \(\[\]\)"),
    ({"bias": X[0]}, ValueError, r"bias must have 1 dimensions, got 2 \(\[6, 8\]\)"),
    ({"bias": TOKEN[:7]}, ValueError, r"bias \[7\] has size 7 in dimension 0 but x \[2, 6, 8\] has 8"),
    ({"bias": TOKEN.half()}, TypeError, "bias must be torch.float32, got torch.float16"),
    ({"x": X.bfloat16(), "bias": TOKEN.half()}, TypeError, "bias must be torch.bfloat16 or torch.float32"),
    ({"bias": TOKEN.to("meta")}, ValueError, "bias is on meta but x is on cpu"),
    ({"approximate": "erf"}, ValueError, "approximate must be 'none' or 'tanh', got 'erf'"),
]
