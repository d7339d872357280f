"""Random configurations of masked_patch_loss."""

import torch

from tests.configurations import Draw, images_and_patches


def configuration(draw: Draw) -> dict:
    batch, tokens, pixels, arguments = images_and_patches(draw)
    rows = tokens
    if draw.chance(0.5):
        rows = draw.of(0, 1, tokens, draw.rng.randint(0, tokens)) if tokens else 0
        arguments["ids"] = draw.ids(batch, rows, tokens=tokens)
    else:
        mask, dtype = draw.mask(batch, tokens), draw.of(torch.bool, torch.int64, torch.float32)
        arguments["mask"] = lambda g: mask(g).to(dtype)
    arguments |= {
        "pred": draw.values(batch, rows, pixels),
        "norm_pix": draw.chance(0.5),
        "kind": draw.of("mse", "mse", "l1", "smooth_l1"),
        "beta": draw.of(1.0, 0.5, 1e-3),
        "layout": draw.of("channels_last", "channels_first"),
        "reduction": draw.of("mean", "none"),
    }
    draws = 48 if arguments["reduction"] == "mean" else 12
    return draw.case(arguments, draw.some("pred"), parameters=draw.wide_parameter("images"), draws=draws)
