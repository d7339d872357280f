"""Random configurations of bias_gelu."""

import math

from tests.configurations import Draw


def configuration(draw: Draw) -> dict:
    shape = [draw.of(draw.few(), draw.tokens()) for _ in range(draw.of(0, 1, 1, 2, 2, 3))]
    columns = draw.columns()
    while math.prod(shape) * columns > 2**17:
        shape[shape.index(max(shape))] = 1
    arguments = {
        "x": draw.values(*shape, columns),
        "bias": draw.values(columns) if draw.chance(0.7) else None,
        "approximate": draw.of("none", "tanh"),
    }
    return draw.case(arguments, draw.some("x", "bias"), parameters=draw.wide_parameter("bias"))
