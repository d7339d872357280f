"""head_divergence against its definition."""

import math

from tests.known_answers import assert_the_reference_is, of_heads, probabilities


def definition(q, k, lse, **others):
    def mean(one, other):
        pairs = [list(zip(a, b, strict=True)) for a, b in zip(one, other, strict=True)]
        return math.fsum(x * math.log(x / y) for row in pairs for x, y in row) / len(pairs)

    p = of_heads(lambda a, b: probabilities(a, b, **others), q, k)
    return {"output": [[[mean(one, other) for other in image] for one in image] for image in p]}


def test_the_reference_in_fp64_is_the_definition():
    assert_the_reference_is(definition, "head_divergence")
