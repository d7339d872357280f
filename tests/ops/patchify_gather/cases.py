"""Contract cases of patchify_gather."""

from __future__ import annotations

import torch

from mimkernels.testing import Case
from tests.inputs import normalisation, patch_count, random_images, token_ids

RICH = "mae"
SPOILED = "images"
PER_IMAGE = ("images", "ids")
SCHEMA_NAMES = {"mean": "scale", "std": "shift"}


def patchify_gather(size, patch, keep, *, masks=0, uint8=False, normalise=False, repeat=False, dtype=None):
    def make(generator):
        tokens = patch_count(size, patch)
        outer = (masks, size[0]) if masks else (size[0],)
        ids = None if keep is None else token_ids(generator, *outer, keep, tokens=tokens)
        if repeat:
            ids = torch.randint(tokens, (*outer, keep), generator=generator)
        mean, std = normalisation(size[1], normalise)
        arguments = {"images": random_images(generator, size, uint8), "ids": ids, "patch_size": patch}
        return {**arguments, "mean": mean, "std": std, "dtype": dtype}

    return make


INPUTS = {
    "plain": patchify_gather((2, 3, 32, 32), 8, 4),
    "mae": patchify_gather((2, 3, 32, 32), 16, 1, normalise=True),
    "all": patchify_gather((2, 3, 12, 20), 4, None, normalise=True),
    "odd": patchify_gather((2, 2, 9, 25), (3, 5), 7),
    "masks": patchify_gather((2, 3, 16, 16), 4, 5, masks=3, normalise=True),
    "repeated-ids": patchify_gather((2, 1, 8, 8), 4, 6, repeat=True),
    "video": patchify_gather((2, 3, 4, 8, 12), (2, 4, 4), 5, normalise=True),
    "no-images": patchify_gather((0, 3, 8, 8), 4, 2),
    "empty-ids": patchify_gather((2, 3, 8, 8), 4, 0, normalise=True),
    "no-patches": patchify_gather((2, 3, 0, 8), 4, 0),
    "no-channels": patchify_gather((2, 0, 8, 8), 4, 3, normalise=True),
}
UINT8_INPUTS = {  # without gradients
    "uint8": patchify_gather((2, 3, 16, 16), 4, 5, uint8=True, normalise=True),
    "uint8-bf16": patchify_gather((2, 3, 8, 8), 4, 3, uint8=True, normalise=True, dtype=torch.bfloat16),
    "uint8-video": patchify_gather((1, 3, 4, 8, 8), 4, 3, uint8=True, normalise=True),
}
CASES = [Case("patchify_gather", label, make, ("images",)) for label, make in INPUTS.items()]
CASES += [Case("patchify_gather", label, make) for label, make in UINT8_INPUTS.items()]
