"""Random configurations of random_mask."""

import torch

from tests.configurations import Draw


def configuration(draw: Draw) -> dict:
    tokens = max(1, draw.tokens())
    arguments = {
        "batch": draw.few(),
        "tokens": tokens,
        "keep": draw.of(1, tokens, draw.rng.randint(1, tokens)),
        "seed": draw.of(0, 7, draw.rng.randrange(2**63)),
        "offset": draw.of(0, 5, draw.rng.randrange(2**63), lambda g: torch.randint(2**40, (), generator=g)),
        "order": draw.of("shuffle", "sorted"),
        "device": None,
    }
    return draw.case(arguments)
