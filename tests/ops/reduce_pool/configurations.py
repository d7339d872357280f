"""Random configurations of reduce_pool."""

import torch

from tests.configurations import Draw, tokens_to_pool


def configuration(draw: Draw) -> dict:
    (batch, tokens, dim), options = tokens_to_pool(draw)
    # Of the exponents 1, 2 and 1/2 torch makes products and roots, which are more exact than any power.
    kind, power = draw.of("mean", "max", "gem", "gem"), draw.of(1.5, 2.5, 3.0, 4.0)
    number = kind == "gem" and draw.chance(0.3)
    arguments = {
        "x": draw.values(batch, tokens, dim, **({"most": 30.0, "flat": False} if kind == "gem" else {})),
        "kind": kind,
        "p": power if number else lambda g: torch.full((1,), power),
        "eps": draw.of(1e-6, 1e-6, 0.5),
    }
    grads = draw.some("x")  # the gradient of p is one number, too small a sample of the plain error
    return draw.case({**arguments, **options}, grads, parameters=("p",))
