"""Calls of upsample_cross_entropy, good and refused."""

import math

import torch

LOGITS = torch.randn(2, 5, 3, 4)
LABELS = torch.tensor([0, 3, 4, 255, 1, 2, 0, 4, 3, 2, 1, 255, 0, 1]).expand(2, 6, 14).clone()
WEIGHT = torch.rand(5) + 0.5

CALL = {
    "logits": LOGITS,
    "labels": LABELS,
    "weight": WEIGHT,
    "ignore_index": 255,
    "align_corners": False,
    "label_smoothing": 0.1,
}
VARIANTS = {"upsample_cross_entropy": {}, "upsample_cross_entropy, plain": {"weight": None, "label_smoothing": 0.0}}
LEAST = {"logits": LOGITS, "labels": LABELS}
REFUSED = [
    ({"logits": LOGITS[0]}, ValueError, r"logits must have 4 dimensions, got 3 \(\[5, 3, 4\]\)"),
    ({"logits": LOGITS.long()}, TypeError, "logits must be a floating-point tensor, got torch.int64"),
    ({"logits": LOGITS[:, :0]}, ValueError, r"at least one class, row and column, got \[2, 0, 3, 4\]"),
    ({"logits": LOGITS[..., :0]}, ValueError, r"at least one class, row and column, got \[2, 5, 3, 0\]"),
    ({"labels": LABELS[0]}, ValueError, r"labels must have 3 dimensions, got 2 \(\[6, 14\]\)"),
    ({"labels": LABELS.float()}, TypeError, "labels must be uint8, int16, int32 or int64, got torch.float32"),
    ({"labels": LABELS[:1]}, ValueError, r"labels \[1, 6, 14\] has size 1 in dimension 0 but logits \[2, 5, 3, 4\]"),
    ({"labels": LABELS.to("meta")}, ValueError, "labels is on meta but logits is on cpu"),
    ({"weight": WEIGHT[:4]}, ValueError, r"weight \[4\] has size 4 in dimension 0 but logits \[2, 5, 3, 4\] has 5"),
    ({"weight": WEIGHT.long()}, TypeError, "weight must be a floating-point tensor, got torch.int64"),
    ({"ignore_index": 2.5}, TypeError, "ignore_index must be an int, got float"),
    ({"align_corners": None}, TypeError, "align_corners must be a bool, got NoneType"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    ({"label_smoothing": math.nan}, ValueError, "label_smoothing must be finite, got nan"),
]
