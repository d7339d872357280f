"""reduce_pool against its definition."""

import math

from tests.known_answers import assert_the_reference_is


def definition(x, mask, p, kind, num_prefix):
    assert kind == "gem" and mask is None and num_prefix == 0
    (power,) = p

    def mean(column):
        return (math.fsum(max(value, 1e-6) ** power for value in column) / len(column)) ** (1 / power)

    return {"output": [[mean(column) for column in zip(*image, strict=True)] for image in x]}


def test_the_reference_in_fp64_is_the_definition():
    assert_the_reference_is(definition, "reduce_pool")
