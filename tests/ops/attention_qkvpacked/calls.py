"""Calls of attention_qkvpacked, good and refused."""

import torch

from mimkernels.ops.attention.spec import TABLE
from tests.ops.attention.calls import NO_TABLE, OPTIONS

CALL = {"qkv": torch.randn(1, 6, 3, 2, 8), **OPTIONS}
VARIANTS = {"attention_qkvpacked": {"key_mask": None, **NO_TABLE}, "attention_qkvpacked_table": {"key_mask": None}}
OPTIONS_IN_USE = {"attention_qkvpacked_table": (TABLE,)}
