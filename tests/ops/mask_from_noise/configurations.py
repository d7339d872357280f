"""Random configurations of mask_from_noise."""

from tests.configurations import Draw


def configuration(draw: Draw) -> dict:
    tokens = max(1, draw.tokens())
    arguments = {
        "noise": draw.values(draw.few(), tokens),
        "keep": draw.of(1, tokens, draw.rng.randint(1, tokens)),
        "order": draw.of("shuffle", "sorted"),
    }
    return draw.case(arguments)
