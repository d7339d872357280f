"""Contract cases of reduce_pool."""

from __future__ import annotations

import torch

from mimkernels.testing import Case
from tests.inputs import allowed_tokens

RICH = "plain"
SPOILED = "x"
PER_IMAGE = ("x", "mask")
NEVER_EMPTY = ("p",)


def reduce_pool(batch, tokens, dim, kind, *, prefix=0, mask=False, p=None, **options):
    def make(generator):
        inputs = {
            "x": torch.randn(batch, tokens, dim, generator=generator),
            "mask": allowed_tokens(generator, batch, tokens, prefix) if mask else None,
        }
        if p is not None:
            inputs["p"] = torch.tensor([p])
        return {**inputs, "kind": kind, "num_prefix": prefix, **options}

    return make


INPUTS = {
    "mean": reduce_pool(2, 49, 64, "mean"),
    "mean-masked": reduce_pool(3, 50, 37, "mean", prefix=1, mask=True),
    "mean-long": reduce_pool(1, 1025, 24, "mean"),
    "max": reduce_pool(2, 49, 64, "max"),
    "max-masked": reduce_pool(3, 50, 37, "max", prefix=1, mask=True),
    "plain": reduce_pool(2, 49, 64, "gem", p=3.0),
    "gem-masked": reduce_pool(3, 50, 37, "gem", p=2.5, prefix=1, mask=True),
    "gem-number": reduce_pool(2, 197, 40, "gem", prefix=1),
    "gem-floor": reduce_pool(2, 9, 16, "gem", p=4.0, eps=0.5),
    "one": reduce_pool(1, 1, 1, "gem", p=2.5),
    "all-prefix": reduce_pool(2, 3, 8, "max", prefix=3),
    "no-tokens": reduce_pool(2, 0, 8, "gem", p=3.0),
    "no-images": reduce_pool(0, 5, 16, "mean"),
    "gem-no-images": reduce_pool(0, 5, 16, "gem", p=3.0),
    "empty-mask-mean": reduce_pool(2, 0, 8, "mean", mask=True),
    "empty-mask-max": reduce_pool(2, 0, 8, "max", mask=True),
    "empty-mask-gem": reduce_pool(2, 0, 8, "gem", p=3.0, mask=True),
    "no-columns": reduce_pool(2, 5, 0, "gem", p=3.0),
}
# The first of the gradients is of an input whose first element always counts.
CASES = [Case("reduce_pool", label, make, ("x", "p")) for label, make in INPUTS.items()]
