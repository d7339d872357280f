"""Inputs that cases of several ops share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def token_ids(generator: torch.Generator, *shape: int, tokens: int) -> Tensor:
    """Ids without repetition in the last dim."""
    *outer, keep = shape
    return torch.rand(*outer, tokens, generator=generator).argsort(-1)[..., :keep]


def random_images(generator, size, uint8):
    if uint8:
        return torch.randint(256, size, generator=generator, dtype=torch.uint8)
    return torch.rand(size, generator=generator)


def normalisation(channels, given):
    return ([0.485, 0.456, 0.406][:channels], [0.229, 0.224, 0.225][:channels]) if given else (None, None)


def patch_count(size, patch) -> int:
    sizes = (patch,) * (len(size) - 2) if isinstance(patch, int) else patch
    return math.prod(length // side for length, side in zip(size[2:], sizes, strict=True))


def allowed_tokens(generator, batch, tokens, prefix):
    """A mask with one image that has no allowed token, and one that has a single one."""
    mask = torch.rand(batch, tokens, generator=generator) < 0.7
    mask[-1] = False
    mask[-2, prefix:] = False
    mask[-2, prefix : prefix + 1] = True
    mask[0, prefix : prefix + 1] = True
    return mask
