"""patchify_gather against its definition."""

from tests.known_answers import assert_the_reference_is, patches


def definition(images, ids, patch_size, mean, std, dtype):
    made = []
    for image, kept in zip(images, ids, strict=True):
        cut = patches(image, patch_size, mean, std)
        made.append([[pixel for channel in cut[i] for row in channel for pixel in row] for i in kept])
    return {"output": made}


def test_the_reference_in_fp64_is_the_definition():
    assert_the_reference_is(definition, "patchify_gather")
