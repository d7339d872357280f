"""Calls of attention_qkvpacked, good and refused."""

import torch

from tests.ops.attention.calls import COSINE_ALONE, NO_TABLE, OPTIONS

CALL = {"qkv": torch.randn(1, 6, 3, 2, 8), **OPTIONS}
VARIANTS = {
    "attention_qkvpacked": {"key_mask": None, **NO_TABLE},
    "attention_qkvpacked_table": {"key_mask": None},
    "attention_qkvpacked_cosine": COSINE_ALONE,
}
