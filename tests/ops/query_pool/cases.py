"""Contract cases of query_pool."""

from __future__ import annotations

import torch

from mimkernels.testing import Case
from tests.inputs import allowed_tokens

RICH = "mae"
SPOILED = "queries"
PER_IMAGE = ("x", "values", "mask")


def query_pool(batch, tokens, dim, groups, *, width=None, prefix=0, mask=False, per_image=False, **options):
    def make(generator):
        inputs = {
            "x": torch.randn(batch, tokens, dim, generator=generator),
            "queries": torch.randn(*(batch,) * per_image, groups, dim, generator=generator),
            "values": None if width is None else torch.randn(batch, tokens, width, generator=generator),
            "mask": allowed_tokens(generator, batch, tokens, prefix) if mask else None,
        }
        return {**inputs, "num_prefix": prefix, **options}

    return make


INPUTS = {
    "mae": query_pool(3, 50, 48, 2, prefix=1, mask=True, return_weights=True),
    "plain": query_pool(2, 49, 64, 1),
    "abmilp": query_pool(2, 197, 96, 1, prefix=1, scale=1.0),
    "efficient-probing": query_pool(2, 49, 64, 8, width=64, sliced=True, prefix=1),
    "sliced": query_pool(3, 21, 36, 3, sliced=True, mask=True, return_weights=True),
    "values": query_pool(2, 33, 24, 5, width=40, per_image=True, return_weights=True),
    "odd": query_pool(3, 17, 37, 7, width=35, prefix=2, mask=True, sliced=True, return_weights=True),
    "odd-per-image": query_pool(2, 19, 37, 11, per_image=True, mask=True),
    "many-queries": query_pool(2, 30, 32, 33, return_weights=True),
    # About 16 queries, from which on 16-bit tokens meet them on tensor cores, and 32, which one warp takes.
    "queries-15": query_pool(2, 19, 24, 15),
    "queries-16": query_pool(3, 37, 72, 16, prefix=1, mask=True, return_weights=True),
    "queries-17": query_pool(2, 20, 40, 17, per_image=True),
    "queries-31": query_pool(3, 18, 16, 31, width=24, mask=True, return_weights=True),
    "queries-32": query_pool(2, 33, 136, 32, prefix=2, return_weights=True),
    "queries-33": query_pool(3, 17, 24, 33, per_image=True, mask=True),
    "queries-33-odd": query_pool(2, 17, 37, 33),
    "queries-16-strips": query_pool(1, 150, 8, 16, width=8),
    "long": query_pool(1, 1025, 16, 2),
    "wide": query_pool(1, 9, 1100, 1, prefix=1, return_weights=True),
    "huge-logits": query_pool(1, 40, 16, 2, scale=300.0, return_weights=True),
    "one": query_pool(1, 1, 1, 1, return_weights=True),
    "all-prefix": query_pool(2, 3, 8, 2, prefix=3, return_weights=True),
    "no-queries": query_pool(2, 5, 8, 0, return_weights=True),
    "no-tokens": query_pool(2, 0, 8, 2, return_weights=True),
    "no-columns": query_pool(2, 5, 0, 2, width=8, scale=1.0, return_weights=True),
    "no-images": query_pool(0, 5, 16, 2, width=8, return_weights=True),
    "empty-mask": query_pool(2, 0, 8, 2, mask=True, return_weights=True),
    "empty-values": query_pool(2, 5, 8, 2, width=0, mask=True, return_weights=True),
    "no-tokens-of-values": query_pool(2, 0, 8, 2, width=4, return_weights=True),
}
# The first of the gradients is of an input whose first element always counts.
CASES = [Case("query_pool", label, make, ("queries", "x", "values")) for label, make in INPUTS.items()]
