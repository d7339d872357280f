"""Contract cases of gather_tokens."""

from __future__ import annotations

import torch

from mimkernels.testing import Case
from tests.inputs import token_ids

RICH = "mae"
SPOILED = "x"
PER_IMAGE = ("x", "ids")


def gather_tokens(batch, tokens, keep, dim, *, masks=0, pos=False, prefix=None, repeat=False):
    def make(generator):
        outer = (masks, batch) if masks else (batch,)
        ids = token_ids(generator, *outer, keep, tokens=tokens)
        if repeat:
            ids = torch.randint(tokens, (*outer, keep), generator=generator)
        return {
            "x": torch.randn(batch, tokens, dim, generator=generator),
            "ids": ids,
            "pos": torch.randn(tokens, dim, generator=generator) if pos else None,
            "prefix": None if prefix is None else torch.randn(prefix, dim, generator=generator),
        }

    return make


INPUTS = {
    "plain": gather_tokens(2, 16, 4, 32),
    "mae": gather_tokens(3, 49, 12, 64, pos=True, prefix=1),
    "odd": gather_tokens(3, 17, 5, 37, pos=True, prefix=2),
    "masks": gather_tokens(2, 20, 6, 24, masks=3, pos=True, prefix=1),
    "repeated-ids": gather_tokens(2, 7, 11, 19, masks=2, pos=True),
    "keep-all": gather_tokens(2, 9, 9, 16),
    "one": gather_tokens(1, 1, 1, 1, pos=True, prefix=1),
    "no-images": gather_tokens(0, 8, 3, 16, pos=True, prefix=1),
    "no-ids": gather_tokens(2, 8, 0, 16, prefix=2),
    "empty-prefix": gather_tokens(2, 8, 3, 16, prefix=0),
    "empty-pos": gather_tokens(2, 0, 0, 16, pos=True, prefix=1),
    "nothing": gather_tokens(2, 0, 0, 16, pos=True, prefix=0),
    "no-columns": gather_tokens(2, 8, 3, 0, pos=True, prefix=1),
}
CASES = [Case("gather_tokens", label, make, ("x", "pos", "prefix")) for label, make in INPUTS.items()]
