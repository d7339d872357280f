"""Random configurations of upsample_cross_entropy."""

import torch

from tests.configurations import Draw


def configuration(draw: Draw) -> dict:
    # Of one class plain PyTorch has gradients of exactly 0, of which sums in other orders leave a rounding.
    batch, classes = draw.few(), draw.of(2, 3, 5, 8, 17, 33, 150, 300)
    size = [draw.of(1, 1, 2, 3, 4, 7) for _ in range(2)]
    target = [draw.of(0, 1, 2, 3, 5, 8, 16, 33) if draw.chance(0.5) else side * draw.of(1, 2, 4) for side in size]
    if draw.small and classes * batch * target[0] * target[1] > 20000:
        classes, target = 3, [side * 2 for side in size]
    ignore, ignored = draw.of(255, -100, 0, classes - 1), draw.of(0.0, 0.2, 0.7, 1.1)

    def labels(g):
        made = torch.randint(classes, (batch, *target), generator=g)
        made[torch.rand(made.shape, generator=g) < ignored] = ignore
        return made.to(dtype)

    dtype = draw.of(torch.int64, torch.int64, torch.int32, torch.int16)
    arguments = {
        # Which pixels touch infinity depends on how F.interpolate rounds their places; NaN lies in both of two taps.
        "logits": draw.values(batch, classes, *size, wild=()),
        "labels": labels,
        "weight": (lambda g: torch.rand(classes, generator=g) + 0.1) if draw.chance(0.4) else None,
        "ignore_index": ignore,
        "align_corners": draw.chance(0.4),
        "label_smoothing": draw.of(0.0, 0.0, 0.1, 1.0),
    }
    return draw.case(arguments, draw.some("logits"), parameters=draw.wide_parameter("weight"), draws=48)
