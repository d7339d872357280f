"""weighted_pool against its definition."""

from tests.known_answers import assert_the_reference_is, pooled, softmax


def definition(x, scores, mask, num_prefix, return_weights):
    assert mask is None and num_prefix == 0
    weights = [softmax(row) for row in scores]
    return {"output": [pooled(row, image) for row, image in zip(weights, x, strict=True)], "weights": weights}


def test_the_reference_in_fp64_is_the_definition():
    assert_the_reference_is(definition, "weighted_pool")
