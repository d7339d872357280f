"""Contract cases of bias_gelu."""

from __future__ import annotations

import torch

from mimkernels.testing import Case

RICH = "plain"
SPOILED = "x"
PER_IMAGE = ("x",)


def bias_gelu(*size, bias=True, spread=1.0, **options):
    def make(generator):
        x = torch.randn(size, generator=generator) * spread
        return {"x": x, "bias": torch.randn(size[-1], generator=generator) if bias else None, **options}

    return make


GRADS = ("x", "bias")
INPUTS = {
    "plain": bias_gelu(2, 49, 64),
    "odd": bias_gelu(3, 17, 37),
    "no-bias": bias_gelu(2, 21, 40, bias=False),
    "tanh": bias_gelu(2, 33, 48, approximate="tanh"),
    "large": bias_gelu(2, 40, 56, spread=5.0),
    "tanh-large": bias_gelu(2, 40, 56, spread=5.0, approximate="tanh"),
    "four-dims": bias_gelu(2, 3, 5, 24),
    "vector": bias_gelu(70),
    "many-rows": bias_gelu(5000, 8),
    "wide": bias_gelu(5, 3072),
    "one": bias_gelu(1, 1, 1),
    "no-rows": bias_gelu(2, 0, 16),
    "no-images": bias_gelu(0, 5, 16),
    "no-columns": bias_gelu(2, 5, 0),
}
FP32_BIAS_INPUTS = {
    "fp32-bias": bias_gelu(3, 21, 40),
    "tanh-fp32-bias": bias_gelu(2, 9, 35, approximate="tanh"),
}
CASES = [Case("bias_gelu", label, make, GRADS) for label, make in INPUTS.items()] + [
    Case("bias_gelu", label, make, GRADS, (torch.bfloat16, torch.float16), ("bias",))
    for label, make in FP32_BIAS_INPUTS.items()
]
