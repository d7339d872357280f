"""Contract cases of mask_from_noise."""

from __future__ import annotations

import torch

from mimkernels.testing import Case

RICH = "mae"
SPOILED = None  # NaN counts as the largest number
PER_IMAGE = ("noise",)


def mask_from_noise(batch, tokens, keep, *, ties=False, **options):
    def make(generator):
        noise = torch.rand(batch, tokens, generator=generator)
        return {"noise": (noise * 4).round() if ties else noise, "keep": keep, **options}

    return make


INPUTS = {
    "mae": mask_from_noise(3, 196, 49),
    "sorted": mask_from_noise(2, 257, 64, order="sorted"),
    "ties": mask_from_noise(2, 33, 8, ties=True),
    "keep-all": mask_from_noise(2, 17, 17),
    "one": mask_from_noise(1, 1, 1),
    "no-images": mask_from_noise(0, 8, 2),
}
CASES = [Case("mask_from_noise", label, make, dtypes=(torch.float32,)) for label, make in INPUTS.items()]
