"""mask_from_noise against its definition."""

from tests.known_answers import assert_the_reference_is, masks


def definition(noise, keep):
    return masks(noise, keep)


def test_the_reference_in_fp64_is_the_definition():
    assert_the_reference_is(definition, "mask_from_noise")
