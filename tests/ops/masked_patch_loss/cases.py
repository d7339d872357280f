"""Contract cases of masked_patch_loss."""

from __future__ import annotations

import math

import torch

from mimkernels.testing import Case
from tests.inputs import normalisation, patch_count, random_images, token_ids

RICH = "mae"
SPOILED = "pred"
PER_IMAGE = ("pred", "images", "ids", "mask")
SCHEMA_NAMES = {"mean": "scale", "std": "shift"}
NO_OPCHECK = ("empty-ids", "empty-mask", "empty-cells", "cells-no-channels", "no-channels")  # means over nothing


def masked_patch_loss(size, patch, keep, *, uint8=False, normalise=False, cells=None, **options):
    def make(generator):
        tokens = patch_count(size, patch)
        sizes = (patch,) * (len(size) - 2) if isinstance(patch, int) else patch
        pixels = size[1] * math.prod(sizes)
        mean, std = normalisation(size[1], normalise)
        arguments = {"images": random_images(generator, size, uint8), "patch_size": patch, "mean": mean, "std": std}
        arguments["pred"] = torch.randn(size[0], tokens if keep is None else keep, pixels, generator=generator)
        if cells is not None:
            shape = [length // side * each for length, side, each in zip(size[2:], sizes, cells, strict=True)]
            arguments["mask"] = torch.rand(size[0], *shape, generator=generator) < 0.5
        elif keep is None:
            arguments["mask"] = torch.rand(size[0], tokens, generator=generator) < 0.75
        else:
            arguments["ids"] = token_ids(generator, size[0], keep, tokens=tokens)
        return {**arguments, **options}

    return make


INPUTS = {
    "ids": masked_patch_loss((2, 3, 32, 32), 8, 12),
    "mae": masked_patch_loss((2, 3, 32, 32), 16, 3, norm_pix=True, normalise=True),
    "mask": masked_patch_loss((3, 3, 16, 24), 8, None, norm_pix=True),
    "per-patch": masked_patch_loss((2, 3, 16, 16), 4, None, reduction="none"),
    "per-patch-ids": masked_patch_loss((2, 3, 16, 16), 4, 5, reduction="none", norm_pix=True),
    "l1": masked_patch_loss((2, 3, 16, 16), 4, 5, kind="l1", layout="channels_first"),
    "smooth-l1": masked_patch_loss((2, 3, 16, 16), 4, None, kind="smooth_l1", beta=0.5),
    "odd": masked_patch_loss((2, 2, 9, 25), (3, 5), 7, norm_pix=True),
    "channels-first": masked_patch_loss((2, 3, 12, 8), 4, None, layout="channels_first", norm_pix=True),
    "uint8": masked_patch_loss((2, 3, 16, 16), 8, 3, uint8=True, normalise=True, norm_pix=True),
    "video": masked_patch_loss((2, 3, 4, 8, 8), (2, 4, 4), 5, norm_pix=True),
    "local-norm": masked_patch_loss((1, 3, 8, 24), 8, None, local_norm=5),
    "local-norm-wide": masked_patch_loss((2, 1, 8, 12), 4, 3, local_norm=47, uint8=True, normalise=True, kind="l1"),
    "local-norm-odd": masked_patch_loss((1, 2, 9, 25), (3, 5), 5, local_norm=3, kind="smooth_l1", reduction="none"),
    "local-norm-video": masked_patch_loss((1, 2, 4, 4, 8), (2, 4, 4), 3, local_norm=7, layout="channels_first"),
    "cells": masked_patch_loss((3, 3, 16, 24), 8, None, cells=(2, 4), kind="l1"),
    "cells-per-patch": masked_patch_loss((2, 3, 16, 16), 8, None, cells=(4, 1), norm_pix=True, reduction="none"),
    "cells-local-norm": masked_patch_loss(
        (1, 2, 6, 36), (6, 18), None, cells=(3, 6), layout="channels_first", kind="smooth_l1", local_norm=9
    ),
    "no-images": masked_patch_loss((0, 3, 8, 8), 4, 2),
    "empty-ids": masked_patch_loss((2, 3, 8, 8), 4, 0),
    "empty-ids-per-patch": masked_patch_loss((2, 3, 8, 8), 4, 0, reduction="none"),
    "empty-mask": masked_patch_loss((2, 3, 0, 8), 4, None, norm_pix=True),
    "empty-cells": masked_patch_loss((2, 3, 0, 8), 4, None, cells=(2, 2)),
    "empty-local-norm": masked_patch_loss((2, 3, 8, 0), 4, None, local_norm=3, reduction="none"),
    "cells-no-channels": masked_patch_loss((2, 0, 16, 16), 8, None, cells=(2, 2), layout="channels_first"),
    "no-channels": masked_patch_loss((2, 0, 8, 8), 4, 3, normalise=True),
}
CASES = [Case("masked_patch_loss", label, make, ("pred",)) for label, make in INPUTS.items()]
