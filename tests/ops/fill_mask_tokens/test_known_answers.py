"""fill_mask_tokens against its definition."""

from tests.known_answers import assert_the_reference_is


def definition(x, mask, mask_token):
    pairs = (zip(*image, strict=True) for image in zip(x, mask, strict=True))
    return {"output": [[mask_token if hidden else token for token, hidden in image] for image in pairs]}


def test_the_reference_in_fp64_is_the_definition():
    assert_the_reference_is(definition, "fill_mask_tokens")
