"""bias_gelu against its definition."""

import math

from tests.known_answers import assert_the_reference_is


def definition(x, bias):
    def gelu(value):
        return value * 0.5 * math.erfc(-value / math.sqrt(2))

    return {"output": [[[gelu(a + b) for a, b in zip(row, bias, strict=True)] for row in image] for image in x]}


def test_the_reference_in_fp64_is_the_definition():
    assert_the_reference_is(definition, "bias_gelu")
