"""Random configurations of masked_patch_loss."""

import math

import torch

from tests.configurations import Draw, images_and_patches


def configuration(draw: Draw) -> dict:
    batch, tokens, pixels, grid, arguments = images_and_patches(draw)
    rows = tokens
    if draw.chance(0.5):
        rows = draw.of(0, 1, tokens, draw.rng.randint(0, tokens)) if tokens else 0
        arguments["ids"] = draw.ids(batch, rows, tokens=tokens)
    else:
        mask, dtype = draw.mask(batch, tokens), draw.of(torch.bool, torch.int64, torch.float32)
        shape = fine_mask(draw, grid, arguments["patch_size"]) if draw.chance(0.4) else None
        if shape is not None:
            mask, shape = draw.mask(batch, math.prod(shape)), (batch, *shape)
        arguments["mask"] = lambda g: mask(g).reshape(shape or (batch, tokens)).to(dtype)
    norm = draw.of("none", "patch", "patch", "box")
    if norm == "box" and draw.small and tokens * pixels > 600:
        norm = "none"  # minutes where a box is many steps of an interpreter
    arguments |= {
        "pred": draw.values(batch, rows, pixels),
        "norm_pix": norm == "patch",
        "local_norm": draw.of(3, 5, 7, 9, 17, 47) if norm == "box" else None,
        "kind": draw.of("mse", "mse", "l1", "smooth_l1"),
        "beta": draw.of(1.0, 0.5, 1e-3),
        "layout": draw.of("channels_last", "channels_first"),
        "reduction": draw.of("mean", "none"),
    }
    draws = 48 if arguments["reduction"] == "mean" else 12
    return draw.case(arguments, draw.some("pred"), parameters=draw.wide_parameter("images"), draws=draws)


def fine_mask(draw: Draw, grid: list[int], patch_size: int | tuple[int, ...]) -> tuple[int, ...] | None:
    """Rows and columns of a mask that divides the patches; None of videos, which have none."""
    if len(grid) != 2:
        return None
    sides = patch_size if isinstance(patch_size, tuple) else (patch_size,) * 2
    cells = [draw.of(*(count for count in range(1, side + 1) if side % count == 0)) for side in sides]
    return tuple(rows * each for rows, each in zip(grid, cells, strict=True))
