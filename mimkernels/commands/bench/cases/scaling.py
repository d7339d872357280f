"""How time and memory grow: with the batch, the mask ratio, and the number of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from mimkernels.commands.bench.cases import attention, gathering, pooling
from mimkernels.commands.bench.cases.gathering import Size
from mimkernels.commands.bench.timing import Benchmark

BATCHES = (8, 16, 32, 64, 128, 256)
IMAGES = 256  # taken in batches of each size: more than caches hold, and the same work for every size
KEPT = (20, 49, 98, 147, 186)  # of 196: mask ratios from 90 % to 5 %
LENGTHS = (50, 197, 785, 2026, 4097, 16385)  # [cls] and a square of patches
LARGEST_MATERIALISED = 4097


def scaling_cases(dtype: torch.dtype, device: str) -> Iterator[Benchmark]:
    def abmilp(size: Size, dtype: torch.dtype, device: str) -> Benchmark:
        return pooling.abmilp(size, dtype, device, backward=False, compiled=False)

    memory_bound = (gathering.gather, gathering.restore, gathering.fill, gathering.loss, gathering.patchify, abmilp)
    for make in memory_bound:
        for batch in BATCHES:
            yield _named(_in_batches(make, batch, dtype, device), "batch")
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
        case.versions = {name: case.versions[name] for name in ("ours", "sdpa", "plain") if name in case.versions}
        yield _named(case, "tokens")


def _in_batches(make: Callable[..., Benchmark], batch: int, dtype: torch.dtype, device: str) -> Benchmark:
    """A case over ``IMAGES`` images, batch after batch; no two batches share inputs."""
    cases = [make(Size(batch=batch), dtype, device) for _ in range(IMAGES // batch)]

    def all_of(version: str) -> Callable[[], None]:
        runs = [case.versions[version] for case in cases]

        def run() -> None:
            for each in runs:
                each()

        return run

    return dataclasses.replace(
        cases[0],
        versions={name: all_of(name) for name in ("ours", "plain")},
        moved_bytes=sum(case.moved_bytes or 0 for case in cases),
        flops=None,
        details=lambda: {"images": IMAGES},
    )


def _named(case: Benchmark, along: str) -> Benchmark:
    case.name += f", by {along}"
    return case
