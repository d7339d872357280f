"""Random configurations of patchify_gather."""

import torch

from tests.configurations import Draw, images_and_patches


def configuration(draw: Draw) -> dict:
    batch, tokens, _, _, arguments = images_and_patches(draw)
    masks = draw.of((), (), (), (1,), (3,), (0,))
    keep = draw.of(0, 1, tokens, draw.rng.randint(0, tokens)) if tokens else 0
    arguments["ids"] = draw.ids(*masks, batch, keep, tokens=tokens) if draw.chance(0.8) else None
    arguments["dtype"] = draw.of(None, None, torch.float32, torch.bfloat16, torch.float16)
    whole = arguments["images"](torch.Generator()).dtype == torch.uint8
    return draw.case(arguments, () if whole else draw.some("images"), parameters=draw.wide_parameter("images"))
