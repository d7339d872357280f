"""Calls of attention, good and refused."""

import torch

Q = torch.randn(1, 2, 6, 8)
OPTIONS = {
    "bias": torch.randn(2, 6, 6),
    "bias_table": torch.randn(9, 2),
    "bias_index": torch.arange(36).view(6, 6) % 9,
    "key_mask": torch.ones(1, 6).bool(),
    "logit_scale": None,
    "scale": 1.0,
    "num_prefix": 1,
    "positions": torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [2.0, 0.0]]),
    "stats": ("entropy", "patch_entropy", "distance", "self_mass"),
}

CALL = {"q": Q, "k": Q.clone(), "v": Q.clone(), **OPTIONS}
NO_TABLE = {"bias_table": None, "bias_index": None}
COSINE_ALONE = {"logit_scale": torch.tensor([2.0, 3.0]), "scale": None, "key_mask": None, **NO_TABLE}
VARIANTS = {
    "attention": {"key_mask": None, **NO_TABLE},
    "attention_table": {"key_mask": None},
    "attention_cosine": COSINE_ALONE,
}
LEAST = {"q": Q, "k": Q, "v": Q}
_TABLE = {"bias_table": OPTIONS["bias_table"], "bias_index": OPTIONS["bias_index"]}
_FOUR = {name: torch.randn(4, 2, 6, 8) for name in "qkv"}
REFUSED = [
    ({"bias": torch.randn(1, 3, 6, 6)}, ValueError, r"bias \[1, 3, 6, 6\].*\[W, H or 1, Nq, Nk\].*q \[1, 2, 6, 8\]"),
    ({"bias": torch.randn(2, 1, 6, 6)}, ValueError, r"bias \[2, 1, 6, 6\] has 2 windows.*1 images.*\[1, 2, 6, 8\]"),
    ({**_FOUR, "bias": torch.randn(3, 1, 6, 6)}, ValueError, r"has 3 windows.*4 images of q \[4, 2, 6, 8\]"),
    ({**_FOUR, "bias": torch.randn(0, 1, 6, 6)}, ValueError, r"has 0 windows.*4 images of q \[4, 2, 6, 8\]"),
    ({**_TABLE, "bias_index": None}, ValueError, "bias_table is given but bias_index is None"),
    ({**_TABLE, "bias_table": None}, ValueError, "bias_index is given but bias_table is None"),
    ({**_TABLE, "bias_table": torch.randn(9, 3)}, ValueError, r"bias_table \[9, 3\].*\[T, H\].*q \[1, 2, 6, 8\]"),
    ({**_TABLE, "bias_table": torch.ones(9, 2).int()}, TypeError, "bias_table must be a floating-point"),
    ({**_TABLE, "bias_index": torch.zeros(6, 5).long()}, ValueError, r"bias_index \[6, 5\].*k \[1, 2, 6, 8\]"),
    ({**_TABLE, "bias_index": torch.zeros(6, 6)}, TypeError, "bias_index must be int64 or int32"),
    ({**_TABLE, "bias_index": torch.full((6, 6), 9)}, IndexError, r"bias_index.*9.*\[0, 9\)"),
    ({**_TABLE, "bias_index": torch.full((6, 6), -1)}, IndexError, r"bias_index.*-1.*\[0, 9\)"),
    ({"logit_scale": torch.randn(3)}, ValueError, r"logit_scale \[3\] must be \[H\] for q \[1, 2, 6, 8\]"),
    ({"logit_scale": torch.randn(2, 1, 1)}, ValueError, r"logit_scale"),
    ({"logit_scale": torch.ones(2).int()}, TypeError, "logit_scale must be a floating-point"),
    ({"logit_scale": torch.randn(2), "scale": 0.5}, ValueError, "scale 0.5 and logit_scale are both given"),
    ({"scale": torch.tensor(1.0, requires_grad=True)}, TypeError, "scale gets no gradient"),
]
