"""gather_tokens against its definition."""

from tests.known_answers import assert_the_reference_is


def definition(x, ids, pos, prefix):
    def token(image, i):
        return [a + b for a, b in zip(image[i], pos[i], strict=True)]

    return {"output": [prefix + [token(image, i) for i in kept] for image, kept in zip(x, ids, strict=True)]}


def test_the_reference_in_fp64_is_the_definition():
    assert_the_reference_is(definition, "gather_tokens")
