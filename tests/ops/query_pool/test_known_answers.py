"""query_pool against its definition."""

import math

from tests.known_answers import assert_the_reference_is, dot, pooled, softmax


def definition(x, queries, values, mask, num_prefix, return_weights):
    assert values is None
    made = {"output": [], "weights": []}
    for image, allowed in zip(x, mask, strict=True):
        here = [ok and n >= num_prefix for n, ok in enumerate(allowed)]
        weights = [
            softmax([dot(q, t) * len(q) ** -0.5 if ok else -math.inf for t, ok in zip(image, here, strict=True)])
            for q in queries
        ]
        made["weights"].append(weights)
        made["output"].append([pooled(row, image) for row in weights])
    return made


def test_the_reference_in_fp64_is_the_definition():
    assert_the_reference_is(definition, "query_pool")
