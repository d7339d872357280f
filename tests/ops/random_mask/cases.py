"""Contract cases of random_mask."""

from __future__ import annotations

import torch

from mimkernels.testing import Case

RICH = "mae"
SPOILED = None
PER_IMAGE = ("batch",)
NEVER_EMPTY = ("step",)


def random_mask(batch, tokens, keep, **options):
    return lambda generator: {"batch": batch, "tokens": tokens, "keep": keep, "device": None, **options}


INPUTS = {
    "mae": random_mask(3, 196, 49, seed=7, offset=3),
    "sorted": random_mask(2, 50, 12, seed=2**62 + 12345, offset=2**40 + 7, order="sorted"),
    "step": random_mask(2, 17, 5, seed=0, offset=torch.tensor(5)),
    "keep-all": random_mask(4, 50, 50, seed=9),
    "one": random_mask(1, 1, 1, seed=1),
    "no-images": random_mask(0, 8, 2, seed=1),
}
CASES = [Case("random_mask", label, make, dtypes=(torch.float32,)) for label, make in INPUTS.items()]
