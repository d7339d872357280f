"""Random configurations of restore_tokens."""

from tests.configurations import Draw


def configuration(draw: Draw) -> dict:
    batch, tokens, dim = draw.few(), draw.tokens(), draw.columns()
    keep, num_prefix = draw.of(0, tokens, draw.rng.randint(0, tokens)), draw.of(0, 0, 1, 2)
    leading = draw.of((), (1,))
    arguments = {
        "x": draw.values(batch, num_prefix + keep, dim),
        "ids_restore": draw.ids(batch, tokens, tokens=tokens),
        "mask_token": draw.values(*draw.of((), (1, 1)), dim),
        "pos": draw.values(*leading, num_prefix + tokens, dim) if draw.chance(0.5) else None,
        "num_prefix": num_prefix,
    }
    return draw.case(arguments, draw.some("x", "mask_token", "pos"))
