"""The residual stream between two branches of a block, against PyTorch and ``torch.compile`` of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch.nn import functional as F

import mimkernels as mk
from mimkernels.commands.bench.cases.pooling import differentiable_case
from mimkernels.commands.bench.timing import Benchmark

# Images, tokens and channels: the decoder of MAE, which fits a large cache, and ViT-B over whole images.
SHAPES = ((8, 197, 512), (64, 196, 768))


def norm_cases(dtype: torch.dtype, device: str, compiled: bool = True) -> Iterator[Benchmark]:
    for shape, backward in itertools.product(SHAPES, (False, True)):
        torch._dynamo.reset()
        yield add_layer_norm(shape, dtype, device, backward, compiled)


def add_layer_norm(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, backward: bool, compiled: bool = True
) -> Benchmark:
    """As in training under autocast: stream and parameters in fp32, the branch and the normalised rows in `dtype`."""
    x = torch.randn(shape, device=device, requires_grad=backward)
    y = torch.randn(shape, device=device).to(dtype).requires_grad_(backward)
    weight, bias = (torch.randn(shape[2], device=device, requires_grad=backward) for _ in range(2))

    def plain():
        residual = x + y
        return residual, F.layer_norm(residual, shape[2:], weight, bias).to(dtype)

    def ours():
        return mk.add_layer_norm(x, y, weight, bias, out_dtype=dtype)

    # Forward reads x and y and writes the residual and the normalised rows; backward reads the gradients of these and
    # the residual, and writes the gradient of x, and of y where its dtype is another.
    moved = [x, y, x, y]
    if backward:
        moved += [x, y, x, x] + [y] * (x.dtype != dtype)
    size = " x ".join(map(str, shape))
    return differentiable_case("add_layer_norm", size, ours, plain, [x, y, weight, bias], moved, backward, compiled)
