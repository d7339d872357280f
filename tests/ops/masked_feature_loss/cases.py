"""Contract cases of masked_feature_loss."""

from __future__ import annotations

import torch

from mimkernels.testing import Case
from tests.inputs import token_ids

RICH = "distill"
SPOILED = "pred"
PER_IMAGE = ("pred", "target", "ids")
NO_OPCHECK = ("no-ids", "no-ids-flat", "no-tokens", "no-columns")  # means over nothing


def masked_feature_loss(batch, tokens, keep, dim, *, flat=False, spread=1.0, center=0.0, **options):
    """``keep`` None: all tokens. ``flat``: as many in all, of any image."""

    def make(generator):
        target = torch.randn(batch, tokens, dim, generator=generator) * spread + center
        ids = None
        if flat:
            ids = token_ids(generator, keep, tokens=batch * tokens)
        elif keep is not None:
            ids = token_ids(generator, batch, keep, tokens=tokens)
        pred = torch.randn(*((batch, tokens) if ids is None else ids.shape), dim, generator=generator)
        return {"pred": pred, "target": target, "ids": ids, **options}

    return make


INPUTS = {
    "distill": masked_feature_loss(2, 12, 5, 48, beta=0.7),
    "flat": masked_feature_loss(3, 11, 14, 40, flat=True, beta=2.0),
    "all-tokens": masked_feature_loss(2, 9, None, 33, beta=2.0),
    "plain": masked_feature_loss(2, 8, 3, 24, norm="none"),
    "mse": masked_feature_loss(2, 8, 3, 37, kind="mse"),
    "l1": masked_feature_loss(2, 8, 3, 16, kind="l1", norm="none"),
    "cosine": masked_feature_loss(2, 8, 5, 40, kind="cosine"),
    "cosine-plain": masked_feature_loss(2, 8, 5, 17, kind="cosine", norm="none", spread=3.0),
    "per-token": masked_feature_loss(2, 12, 7, 64, reduction="none"),
    "per-token-flat": masked_feature_loss(2, 12, 13, 20, flat=True, reduction="none", kind="mse"),
    "cosine-per-token": masked_feature_loss(2, 12, 7, 32, reduction="none", kind="cosine"),
    "far-from-zero": masked_feature_loss(2, 6, 4, 96, center=30.0, spread=0.5),
    "wide": masked_feature_loss(1, 5, 3, 1100, eps=1e-6),
    "one-column": masked_feature_loss(2, 5, 3, 1, reduction="none"),
    "one-image": masked_feature_loss(1, 9, 4, 24),
    "many-rows": masked_feature_loss(3, 40, 30, 8, kind="mse"),
    "no-images": masked_feature_loss(0, 5, 2, 16),
    "no-ids": masked_feature_loss(2, 5, 0, 16),
    "no-ids-flat": masked_feature_loss(2, 5, 0, 16, flat=True),
    "no-ids-per-token": masked_feature_loss(2, 5, 0, 16, reduction="none"),
    "no-tokens": masked_feature_loss(2, 0, None, 16),
    "no-columns": masked_feature_loss(2, 5, 3, 0),
}
MIXED = {
    "other-dtype": masked_feature_loss(2, 12, 5, 48),
    "other-dtype-cosine": masked_feature_loss(2, 7, 9, 35, flat=True, kind="cosine"),
}
HALVES = (torch.bfloat16, torch.float16)
CASES = [Case("masked_feature_loss", label, make, ("pred",)) for label, make in INPUTS.items()] + [
    Case("masked_feature_loss", f"{label}-fp32-{name}", make, ("pred",), HALVES, (name,))
    for label, make in MIXED.items()
    for name in ("pred", "target")
]
