"""Contract cases of attention_qkvpacked: only where gradients are written differs from attention."""

from __future__ import annotations

import torch

from tests.ops.attention.cases import STATISTICS, attention, case

RICH = "plain"
SPOILED = "qkv"
PER_IMAGE = ("qkv", "key_mask")
MATRIX_PRODUCTS = True


def attention_qkvpacked(*sizes, **options):
    def make(generator):
        inputs = attention(*sizes, **options)(generator)
        return {"qkv": torch.stack([inputs.pop(name).transpose(1, 2) for name in "qkv"], dim=2), **inputs}

    return make


INPUTS = {
    "plain": attention_qkvpacked(2, 2, 17, 16),
    "everything": attention_qkvpacked(
        3, 2, 21, 24, bias=(3, 2, 21, 21), mask=True, prefix=2, stats=STATISTICS, positions="per-image"
    ),
    "one-token": attention_qkvpacked(2, 3, 1, 8, stats=("entropy", "peak")),
    "no-tokens": attention_qkvpacked(2, 2, 0, 16, stats=("entropy",)),
    "empty-positions": attention_qkvpacked(2, 2, 5, 8, prefix=5, stats=("distance", "entropy")),
    "empty-bias-and-mask": attention_qkvpacked(2, 2, 0, 16, bias=(2, 0, 0), mask=True, stats=("distance",)),
    "odd": attention_qkvpacked(3, 5, 9, 24, stats=("entropy",)),
    "table-and-windows": attention_qkvpacked(6, 2, 16, 16, table=49, bias=(3, 1, 16, 16), stats=("entropy",)),
    "empty-table": attention_qkvpacked(2, 2, 0, 16, table=0),
    "cosine-table-and-windows": attention_qkvpacked(6, 2, 16, 16, table=49, bias=(3, 1, 16, 16), cosine=True),
    "cosine-of-no-heads": attention_qkvpacked(2, 0, 5, 16, cosine=True),
    "length-257": attention_qkvpacked(1, 1, 257, 16),
    "dim-128": attention_qkvpacked(1, 2, 33, 128),
}
GRADS = ("qkv", "bias", "bias_table", "logit_scale")
CASES = [case("attention_qkvpacked", label, make, GRADS) for label, make in INPUTS.items()]
