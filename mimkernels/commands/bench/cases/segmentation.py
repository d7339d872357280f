"""The cross-entropy of logits resized to their labels, against PyTorch and ``torch.compile`` of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

import mimkernels as mk
from mimkernels.commands.bench.cases.pooling import differentiable_case
from mimkernels.commands.bench.timing import Benchmark

IMAGES, CLASSES, GRID, SIDE = 2, 150, 32, 512  # ADE20K's classes, patches of 16 pixels


def segmentation_cases(dtype: torch.dtype, device: str, compiled: bool = True) -> Iterator[Benchmark]:
    for backward in (False, True):
        torch._dynamo.reset()
        yield upsample_cross_entropy(dtype, device, backward, compiled)


def upsample_cross_entropy(dtype: torch.dtype, device: str, backward: bool, compiled: bool = True) -> Benchmark:
    logits = torch.randn(IMAGES, CLASSES, GRID, GRID, device=device).to(dtype).requires_grad_(backward)
    labels = torch.randint(CLASSES, (IMAGES, SIDE, SIDE), device=device)
    labels[:, :32] = 255

    def plain():
        full = F.interpolate(logits, (SIDE, SIDE), mode="bilinear")
        return F.cross_entropy(full, labels, ignore_index=255).float()

    def ours():
        return mk.upsample_cross_entropy(logits, labels)

    # Labels are read in each direction, logits too; their gradient is written.
    moved = (3 * [logits] + 2 * [labels]) if backward else [logits, labels]
    size = f"B={IMAGES} {CLASSES} classes, {GRID} x {GRID} to {SIDE} x {SIDE}"
    return differentiable_case("upsample_cross_entropy", size, ours, plain, [logits], moved, backward, compiled)
