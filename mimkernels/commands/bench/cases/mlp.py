"""The bias and GELU between the two layers of an MLP, against PyTorch and ``torch.compile`` of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch.nn import functional as F

import mimkernels as mk
from mimkernels.commands.bench.cases.pooling import differentiable_case
from mimkernels.commands.bench.timing import Benchmark

# Images x tokens, and features: the decoder of MAE, which fits a large cache, and ViT-B over whole images.
SHAPES = ((8 * 197, 2048), (64 * 196, 3072))


def mlp_cases(dtype: torch.dtype, device: str, compiled: bool = True) -> Iterator[Benchmark]:
    for shape, backward in itertools.product(SHAPES, (False, True)):
        torch._dynamo.reset()
        yield bias_gelu(shape, dtype, device, backward, compiled)


def bias_gelu(
    shape: tuple[int, int], dtype: torch.dtype, device: str, backward: bool, compiled: bool = True
) -> Benchmark:
    x = torch.randn(shape, device=device).to(dtype).requires_grad_(backward)
    bias = torch.randn(shape[1], device=device).to(dtype).requires_grad_(backward)

    def plain():
        return F.gelu(x + bias)

    def ours():
        return mk.bias_gelu(x, bias)

    # Forward reads x and writes the output; backward reads x and the output's gradient, and writes that of x.
    moved = (5 if backward else 2) * [x]
    return differentiable_case(
        "bias_gelu", f"{shape[0]} x {shape[1]}", ours, plain, [x, bias], moved, backward, compiled
    )
