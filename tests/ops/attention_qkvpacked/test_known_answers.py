"""attention_qkvpacked against its definition."""

from tests.known_answers import assert_the_reference_is
from tests.ops.attention.test_known_answers import definition as attention


def definition(qkv, **others):
    q, k, v = (
        [[[token[part][h] for token in image] for h in range(len(image[0][part]))] for image in qkv]
        for part in range(3)
    )
    return attention(q, k, v, **others)


def test_the_reference_in_fp64_is_the_definition():
    assert_the_reference_is(definition, "attention_qkvpacked")
