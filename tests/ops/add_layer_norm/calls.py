"""Calls of add_layer_norm, good and refused."""

import torch

X, Y = torch.randn(2, 2, 6, 8)
WEIGHT, BIAS, SCALE = torch.randn(3, 8)
DROP = torch.tensor([1.25, 0.0])

CALL = {
    "x": X,
    "y": Y,
    "weight": WEIGHT,
    "bias": BIAS,
    "scale": SCALE,
    "drop": DROP,
    "eps": 1e-6,
    "out_dtype": torch.float32,
}
VARIANTS = {
    "add_layer_norm": {},
    "add_layer_norm of a plain sum": {"scale": None, "drop": None},
    "add_layer_norm without a branch": {"y": None, "scale": None, "drop": None},
}
LEAST = {"x": X, "y": Y}
REFUSED = [
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ({"x": X.long()}, TypeError, "x must be a floating-point tensor, got torch.int64"),
    ({"x": X[0, 0, 0]}, ValueError, r"x must have at least 1 dimension, got 0 \(\[\]\)"),
    ({"y": Y.long()}, TypeError, "y must be a floating-point tensor, got torch.int64"),
    ({"y": Y[:, :5]}, ValueError, r"y \[2, 5, 8\] and x \[2, 6, 8\] must have the same shape"),
    ({"y": Y.to("meta")}, ValueError, "y is on meta but x is on cpu"),
    ({"weight": X[0]}, ValueError, r"weight must have 1 dimensions, got 2 \(\[6, 8\]\)"),
    ({"weight": WEIGHT[:7]}, ValueError, r"weight \[7\] has size 7 in dimension 0 but x \[2, 6, 8\] has 8"),
    ({"bias": BIAS[:7]}, ValueError, r"bias \[7\] has size 7 in dimension 0 but x \[2, 6, 8\] has 8"),
    ({"bias": BIAS.double()}, TypeError, "bias must be at most torch.float32 beside torch.float32 tokens"),
    ({"scale": SCALE[:7]}, ValueError, r"scale \[7\] has size 7 in dimension 0 but x \[2, 6, 8\] has 8"),
    ({"drop": SCALE}, ValueError, r"drop \[8\] has size 8 in dimension 0 but x \[2, 6, 8\] has 2 in dimension 0"),
    ({"drop": DROP.clone().requires_grad_()}, TypeError, "drop gets no gradient .*; detach it"),
    ({"x": X[0, 0], "y": Y[0, 0], "drop": DROP}, ValueError, r"for each image, but x has 1 dimension \(\[8\]\)"),
    ({"y": None, "scale": SCALE}, ValueError, "scale is given but y, which it scales, is None"),
    ({"y": None, "drop": DROP}, ValueError, "drop is given but y, which it scales, is None"),
    ({"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
    ({"out_dtype": torch.int64}, TypeError, "out_dtype must be floating point, got torch.int64"),
]
