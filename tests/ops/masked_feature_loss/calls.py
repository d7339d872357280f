"""Calls of masked_feature_loss, good and refused."""

import math

import torch

IDS = torch.tensor([[0, 3], [5, 1]])
PRED = torch.randn(2, 2, 8)
TARGET = torch.randn(2, 6, 8)

CALL = {
    "pred": PRED,
    "target": TARGET,
    "ids": IDS,
    "norm": "ln",
    "eps": 1e-5,
    "kind": "smooth_l1",
    "beta": 1.0,
}
VARIANTS = {
    "masked_feature_loss": {"kind": "mse"},
    "masked_feature_loss of all images' ids": {
        "pred": PRED.flatten(0, 1),
        "ids": torch.tensor([11, 0, 3, 7]),
        "kind": "cosine",
    },
}
LEAST = {"pred": PRED, "target": TARGET, "ids": IDS}
REFUSED = [
    ({"pred": PRED[..., :7]}, ValueError, r"pred \[2, 2, 7\] has size 7 in dimension 2 but target \[2, 6, 8\] has 8"),
    ({"pred": PRED[0, 0]}, ValueError, "pred must have 2 or 3 dimensions, got 1"),
    ({"target": TARGET[0]}, ValueError, "target must have 3 dimensions, got 2"),
    ({"target": TARGET.long()}, TypeError, "target must be a floating-point tensor, got torch.int64"),
    ({"target": TARGET[:1]}, ValueError, r"pred \[2, 2, 8\] has size 2 in dimension 0 but target \[1, 6, 8\]"),
    ({"target": TARGET.to("meta")}, ValueError, "target is on meta but pred is on cpu"),
    ({"ids": None}, ValueError, r"without ids, pred \[2, 2, 8\] must hold all tokens of target \[2, 6, 8\]"),
    ({"ids": IDS[:, :1]}, ValueError, r"ids \[2, 1\] and pred \[2, 2, 8\] must agree in \[B, K\]"),
    ({"ids": IDS.flatten()}, ValueError, "ids must have 2 dimensions, got 1"),
    (
        {"pred": PRED[0], "ids": torch.arange(3)},
        ValueError,
        r"ids \[3\] and pred \[2, 8\] must agree in \[M\]",
    ),
    ({"ids": IDS.float()}, TypeError, "ids must be int64 or int32, got torch.float32"),
    ({"norm": "l2"}, ValueError, "norm must be one of ln, none, got 'l2'"),
    ({"kind": "huber"}, ValueError, "kind must be one of mse, l1, smooth_l1, cosine, got 'huber'"),
    ({"reduction": "sum"}, ValueError, "reduction must be 'mean' or 'none', got 'sum'"),
    ({"beta": 0.0}, ValueError, "beta must be positive, got 0.0"),
    ({"eps": math.nan}, ValueError, "eps must be finite, got nan"),
]
