"""Contract cases of weighted_pool."""

from __future__ import annotations

import torch

from mimkernels.testing import Case
from tests.inputs import allowed_tokens

RICH = "plain"
SPOILED = "x"
PER_IMAGE = ("x", "scores", "mask")


def weighted_pool(batch, tokens, dim, groups=None, *, prefix=0, mask=False, **options):
    def make(generator):
        inputs = {
            "x": torch.randn(batch, tokens, dim, generator=generator),
            "scores": torch.randn(batch, *(() if groups is None else (groups,)), tokens, generator=generator),
            "mask": allowed_tokens(generator, batch, tokens, prefix) if mask else None,
        }
        return {**inputs, "num_prefix": prefix, **options}

    return make


INPUTS = {
    "plain": weighted_pool(2, 49, 64, return_weights=True),
    "groups": weighted_pool(3, 50, 48, 6, prefix=1, mask=True, return_weights=True),
    "as-given": weighted_pool(3, 21, 40, 3, normalize=False, mask=True, return_weights=True),
    "many-groups": weighted_pool(3, 21, 72, 17, prefix=1, mask=True, return_weights=True),
    "many-groups-as-given": weighted_pool(2, 19, 24, 33, normalize=False, mask=True),
    "odd": weighted_pool(3, 17, 37, prefix=2, mask=True),
    "long": weighted_pool(1, 1025, 16, 2),
    "wide": weighted_pool(1, 9, 1100, 1, normalize=False, prefix=1),
    "all-prefix": weighted_pool(2, 3, 8, prefix=3, return_weights=True),
    "no-tokens": weighted_pool(2, 0, 8, return_weights=True),
    "no-images": weighted_pool(0, 5, 16, 2),
    "empty-mask": weighted_pool(2, 0, 8, 3, mask=True, return_weights=True),
    "empty-mask-as-given": weighted_pool(2, 0, 8, normalize=False, mask=True),
    "no-columns": weighted_pool(2, 5, 0, 2, return_weights=True),
}
# The first of the gradients is of an input whose first element always counts.
CASES = [Case("weighted_pool", label, make, ("x", "scores")) for label, make in INPUTS.items()]
