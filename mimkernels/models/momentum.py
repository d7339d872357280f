"""What joint-embedding models share: a copy of the weights that follows them, and rows of all processes."""

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from mimkernels.nn.processes import distributed

__all__ = ["copy_without_gradients", "feature_std", "follow", "gather", "half_cosine"]

_Module = TypeVar("_Module", bound=nn.Module)


def copy_without_gradients(module: _Module) -> _Module:
    """A copy with memory of its own, whose parameters take no gradient."""
    copied = copy.deepcopy(module)
    copied.requires_grad_(False)
    return copied


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, momentum: float) -> None:
    """Move the parameters of `average` to ``momentum * average + (1 - momentum) * module``, in place.

    Buffers, such as the running statistics of BatchNorm, stay the average's own, as published.
    """
    ours: list[Tensor] = list(average.parameters())
    theirs: list[Tensor] = list(module.parameters())
    torch._foreach_lerp_(ours, theirs, 1 - momentum)


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """The rows of all processes, ``[P * B, ...]`` in the order of ranks, without gradient; of one process `x` itself.

    Every process has to call this, with the same number of rows.
    """
    if not distributed():
        return x.detach()
    processes = torch.distributed.get_world_size()
    if processes == 1:
        return x.detach()
    rows = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(processes)]
    torch.distributed.all_gather(rows, x.detach().contiguous())
    return torch.cat(rows)


def half_cosine(start: float, end: float, share: float) -> float:
    """What goes from `start` to `end` along half a cosine, after `share` of the training."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Standard deviation of L2-normalised rows ``[B, D]`` over the batch, times the root of D, mean over D; fp32.

    1: rows point in all directions; 0: all rows are one, the model has collapsed.
    """
    rows = nn.functional.normalize(features.float(), dim=1)
    return rows.std(0, correction=0).mean() * math.sqrt(rows.shape[1])
