"""received_attention against its definition."""

import math

from tests.known_answers import assert_the_reference_is, of_heads, probabilities


def definition(q, k, lse, **others):
    p = of_heads(lambda a, b: probabilities(a, b, **others), q, k)
    return {"output": of_heads(lambda head: [math.fsum(c) / len(head) for c in zip(*head, strict=True)], p)}


def test_the_reference_in_fp64_is_the_definition():
    assert_the_reference_is(definition, "received_attention")
