"""Random configurations of fill_mask_tokens."""

import torch

from tests.configurations import Draw


def configuration(draw: Draw) -> dict:
    batch, tokens, dim = draw.few(), draw.tokens(), draw.columns()
    mask, dtype = draw.mask(batch, tokens), draw.of(torch.bool, torch.int64, torch.int32, torch.float32, torch.uint8)
    arguments = {
        "x": draw.values(batch, tokens, dim),
        "mask": lambda g: mask(g).to(dtype),
        "mask_token": draw.values(*draw.of((), (1, 1)), dim),
    }
    return draw.case(arguments, draw.some("x", "mask_token"))
