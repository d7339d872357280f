"""Random configurations of add_layer_norm."""

import math

import torch

from tests.configurations import Draw


def configuration(draw: Draw) -> dict:
    shape = [draw.of(draw.few(), draw.tokens()) for _ in range(draw.of(0, 1, 1, 2, 2, 2, 3))]
    columns = draw.columns()
    while math.prod(shape) * columns > 2**17:
        shape[shape.index(max(shape))] = 1
    branch = draw.chance(0.85)
    # A huge row that is all the same swallows the other of a sum: what remains of its variance is the sum's rounding.
    most = 30.0 if branch else math.inf
    factors = torch.tensor([draw.of(0.0, 1.0, 1.25, 1 / 0.7) for _ in range(shape[0])]) if shape else None
    arguments = {
        "x": draw.values(*shape, columns, most=most),
        "y": draw.values(*shape, columns, most=most) if branch else None,
        # Which gradients of a row are NaN and which infinite, where a weight is infinite, depends on the order of sums.
        # Of numbers beyond fp16's, the sign alone is left, which the rounding of the residual may turn.
        "weight": draw.values(columns, most=1e3, wild=(math.nan,)) if draw.chance(0.8) else None,
        "bias": draw.values(columns) if draw.chance(0.7) else None,
        "scale": draw.values(columns, most=30.0) if branch and draw.chance(0.4) else None,
        "drop": factors if branch and draw.chance(0.4) else None,
        "eps": draw.of(1e-5, 1e-6, 1e-3),
        "out_dtype": draw.of(None, None, torch.float32, torch.bfloat16, torch.float16),
    }
    # An fp32 scale beside 16-bit rows has a contract case: plain PyTorch rounds the numbers of which its gradient is
    # the sum to 16 bits, which may remove every error by luck, in all draws.
    wide = draw.of((), (), ("weight", "bias", "drop"), ("x", "weight", "bias", "scale", "drop"), ("y",))
    return draw.case(arguments, draw.some("x", "y", "weight", "bias", "scale"), parameters=wide)
