"""How time and memory grow: with the batch, the mask ratio, and the number of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from mimkernels.bench import attention, gathering, pooling
from mimkernels.bench.gathering import Size
from mimkernels.bench.harness import Benchmark
from mimkernels.bench.memory import peak_bytes

BATCHES = (8, 16, 32, 64, 128, 256)
KEPT = (20, 49, 98, 147, 186)  # of 196: mask ratios from 90 % to 5 %
LENGTHS = (50, 197, 785, 2026, 4097, 16385)  # [cls] and a square of patches
LARGEST_MATERIALISED = 4097


def scaling_cases(dtype: torch.dtype, device: str) -> Iterator[Benchmark]:
    for batch in BATCHES:
        size = Size(batch=batch)
        for make in (gathering.gather, gathering.restore, gathering.fill, gathering.loss, gathering.patchify):
            yield _named(make(size, dtype, device), "batch")
        yield _named(pooling.abmilp(size, dtype, device, backward=False, compiled=False), "batch")
    for keep in KEPT:
        size = dataclasses.replace(Size(), keep=keep)
        for make in (gathering.gather, gathering.patchify, gathering.loss_of_masked):
            yield _named(make(size, dtype, device), "mask ratio")
    for length in LENGTHS:
        heads = 12 if length < 1000 else 1
        case = attention.attention_case(attention.Shape(1, heads, length, 64), dtype, device, backward=True)
        if length > LARGEST_MATERIALISED:
            del case.versions["plain"]
            case.check = lambda: None  # the materialised attention is what ours is compared with
        versions = {name: case.versions[name] for name in ("ours", "sdpa", "plain") if name in case.versions}
        case.versions = versions
        case.details = lambda versions=versions: {
            "peak_bytes": {name: peak_bytes(run, device) for name, run in versions.items()}
        }
        yield _named(case, "tokens")


def _named(case: Benchmark, along: str) -> Benchmark:
    case.name += f", by {along}"
    return case
