"""Contract cases of fill_mask_tokens."""

from __future__ import annotations

import torch

from mimkernels.testing import Case

RICH = "plain"
SPOILED = "x"
PER_IMAGE = ("x", "mask")


def fill_mask_tokens(batch, tokens, dim, ratio=0.6):
    def make(generator):
        return {
            "x": torch.randn(batch, tokens, dim, generator=generator),
            "mask": torch.rand(batch, tokens, generator=generator) < ratio,
            "mask_token": torch.randn(dim, generator=generator),
        }

    return make


INPUTS = {
    "plain": fill_mask_tokens(3, 49, 64),
    "odd": fill_mask_tokens(2, 17, 37),
    "all-masked": fill_mask_tokens(2, 5, 16, ratio=2.0),
    "none-masked": fill_mask_tokens(2, 5, 16, ratio=-1.0),
    "empty-mask": fill_mask_tokens(2, 0, 16),
    "no-images": fill_mask_tokens(0, 5, 16),
}
CASES = [Case("fill_mask_tokens", label, make, ("x", "mask_token")) for label, make in INPUTS.items()]
