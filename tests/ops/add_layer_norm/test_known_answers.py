"""add_layer_norm against its definition."""

import math

from tests.known_answers import assert_the_reference_is


def definition(x, y, weight, bias, scale, drop):
    residual = [
        [
            [a + factor * gamma * b for a, b, gamma in zip(*rows, scale, strict=True)]
            for rows in zip(*image, strict=True)
        ]
        for *image, factor in zip(x, y, drop, strict=True)
    ]

    def normalised(row):
        mean = math.fsum(row) / len(row)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in row) / len(row) + 1e-5)
        return [(value - mean) / deviation * w + b for value, w, b in zip(row, weight, bias, strict=True)]

    return {"residual": residual, "normalised": [[normalised(row) for row in image] for image in residual]}


def test_the_reference_in_fp64_is_the_definition():
    assert_the_reference_is(definition, "add_layer_norm")
