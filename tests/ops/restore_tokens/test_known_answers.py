"""restore_tokens against its definition."""

from tests.known_answers import assert_the_reference_is


def definition(x, ids_restore, mask_token, pos, num_prefix):
    made = []
    for image, restore in zip(x, ids_restore, strict=True):
        kept = image[num_prefix:]
        tokens = image[:num_prefix] + [kept[i] if i < len(kept) else mask_token for i in restore]
        made.append([[a + b for a, b in zip(*pair, strict=True)] for pair in zip(tokens, pos, strict=True)])
    return {"output": made}


def test_the_reference_in_fp64_is_the_definition():
    assert_the_reference_is(definition, "restore_tokens")
