"""Calls of attention_qkvpacked, good and refused."""

import torch

from tests.ops.attention.calls import OPTIONS

CALL = {"qkv": torch.randn(1, 6, 3, 2, 8), **OPTIONS}
VARIANTS = {"attention_qkvpacked": {"key_mask": None}}
