"""random_mask against its definition."""

from tests.known_answers import assert_the_reference_is, masks, philox


def definition(batch, tokens, keep, seed, offset, device):
    key, step = (seed % 2**32, seed // 2**32), (offset % 2**32, offset // 2**32)
    noise = [[philox((i // 4, b, *step), key)[i % 4] for i in range(tokens)] for b in range(batch)]
    return masks(noise, keep)


def test_the_reference_in_fp64_is_the_definition():
    assert_the_reference_is(definition, "random_mask")
