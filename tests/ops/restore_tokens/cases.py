"""Contract cases of restore_tokens."""

from __future__ import annotations

import torch

from mimkernels.testing import Case
from tests.inputs import token_ids

RICH = "mae"
SPOILED = "x"
PER_IMAGE = ("x", "ids_restore")


def restore_tokens(batch, tokens, keep, dim, *, pos=False, num_prefix=0, repeat=False):
    def make(generator):
        restore = token_ids(generator, batch, tokens, tokens=tokens)
        if repeat:
            restore = torch.randint(tokens, (batch, tokens), generator=generator)
        return {
            "x": torch.randn(batch, num_prefix + keep, dim, generator=generator),
            "ids_restore": restore,
            "mask_token": torch.randn(dim, generator=generator),
            "pos": torch.randn(num_prefix + tokens, dim, generator=generator) if pos else None,
            "num_prefix": num_prefix,
        }

    return make


INPUTS = {
    "plain": restore_tokens(2, 16, 4, 32),
    "mae": restore_tokens(3, 49, 12, 64, pos=True, num_prefix=1),
    "odd": restore_tokens(3, 17, 5, 37, pos=True, num_prefix=2),
    "keep-all": restore_tokens(2, 9, 9, 16, pos=True),
    "keep-none": restore_tokens(2, 9, 0, 16, num_prefix=1),
    "not-a-permutation": restore_tokens(2, 12, 5, 19, repeat=True, pos=True),
    "empty-pos": restore_tokens(2, 0, 0, 16, pos=True),
    "prefix-alone": restore_tokens(2, 0, 0, 16, pos=True, num_prefix=2),
    "no-columns": restore_tokens(2, 9, 4, 0, pos=True, num_prefix=1),
    "no-images": restore_tokens(0, 8, 3, 16, pos=True, num_prefix=1),
}
CASES = [Case("restore_tokens", label, make, ("x", "mask_token", "pos")) for label, make in INPUTS.items()]
