"""Contract cases of upsample_cross_entropy."""

from __future__ import annotations

import torch

from mimkernels.testing import Case

RICH = "rich"
SPOILED = "logits"
PER_IMAGE = ("logits", "labels")
NEVER_EMPTY = ("weight",)  # there is a class
NO_OPCHECK = ("no-rows", "all-ignored")  # means over nothing


def upsample_cross_entropy(batch, classes, size, target, *, ignored=0.2, weighted=False, spread=1.0, **options):
    def make(generator):
        logits = torch.randn(batch, classes, *size, generator=generator) * spread
        labels = torch.randint(classes, (batch, *target), generator=generator)
        hidden = torch.rand(labels.shape, generator=generator) < ignored
        labels[hidden] = options.get("ignore_index", 255)
        if 0 < ignored < 1 and labels.numel():
            labels[0, 0, 0] = 0  # which lies nearest to the first logits
        weight = torch.rand(classes, generator=generator) + 0.1 if weighted else None
        return {"logits": logits, "labels": labels, "weight": weight, **options}

    return make


INPUTS = {
    "plain": upsample_cross_entropy(2, 5, (4, 4), (16, 16)),
    "rich": upsample_cross_entropy(2, 19, (3, 4), (12, 20), weighted=True, label_smoothing=0.1, ignore_index=-100),
    "odd": upsample_cross_entropy(3, 33, (3, 5), (17, 11)),
    "aligned": upsample_cross_entropy(2, 7, (3, 4), (11, 16), align_corners=True),
    "smoothed": upsample_cross_entropy(1, 8, (4, 3), (9, 12), label_smoothing=0.3),
    "smoothed-away": upsample_cross_entropy(1, 3, (2, 2), (5, 4), label_smoothing=1.0),
    "weighted": upsample_cross_entropy(2, 16, (2, 3), (8, 9), weighted=True),
    "same-size": upsample_cross_entropy(2, 6, (5, 7), (5, 7), ignored=0.0),
    "smaller": upsample_cross_entropy(2, 6, (9, 13), (4, 3)),
    "smaller-aligned": upsample_cross_entropy(2, 6, (9, 8), (4, 1), align_corners=True),
    "one-source": upsample_cross_entropy(2, 4, (1, 1), (6, 5), align_corners=True),
    "one-row": upsample_cross_entropy(1, 4, (1, 6), (7, 6)),
    "one-class": upsample_cross_entropy(1, 1, (2, 2), (4, 4)),
    "many-classes": upsample_cross_entropy(1, 150, (2, 2), (9, 8)),
    "more-classes": upsample_cross_entropy(1, 300, (2, 1), (3, 4), label_smoothing=0.1, weighted=True),
    "long-cell": upsample_cross_entropy(1, 3, (1, 2), (20, 40)),
    "large": upsample_cross_entropy(2, 9, (3, 3), (10, 12), spread=30.0),
    "no-images": upsample_cross_entropy(0, 3, (2, 2), (4, 4)),
    "no-rows": upsample_cross_entropy(2, 3, (2, 2), (0, 4)),
    "all-ignored": upsample_cross_entropy(2, 3, (2, 2), (4, 4), ignored=1.1),
}
CASES = [Case("upsample_cross_entropy", label, make, ("logits",)) for label, make in INPUTS.items()]
