"""The kernels that move memory, as shares of a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu_stages.target import Target, medians, noted, on, sets_for
from mimkernels.commands.bench.cases.gathering import Size, gathering_cases
from mimkernels.commands.bench.cases.mlp import bias_gelu
from mimkernels.commands.bench.cases.norm import add_layer_norm
from mimkernels.commands.bench.cases.pooling import pooling_cases
from mimkernels.commands.bench.timing import Benchmark

BATCHES = (64, 256)


def all_cases(batch: int, target: Target) -> Iterator[Benchmark]:
    """The cases of `batch` images; each call makes inputs of its own."""
    dtype, device = target.dtype, target.device
    size = Size(batch=2, tokens=16, dim=32, keep=4, patch=4) if target.rehearsal else Size(batch=batch)
    rows = size.batch * size.tokens
    for backward in (False, True):
        yield add_layer_norm((size.batch, size.tokens, size.dim), dtype, device, backward, compiled=False)
        yield bias_gelu((rows, 4 * size.dim), dtype, device, backward, compiled=False)
    yield from gathering_cases(size, dtype, device, compiled=False)
    yield from pooling_cases(size, dtype, device, compiled=False)


def batches(target: Target) -> tuple[int, ...]:
    return BATCHES[:1] if target.rehearsal else BATCHES


def timed_sets(target: Target, batch: int) -> Iterator[list[Benchmark]]:
    """Every case with the sets of inputs that take turns."""
    several = [all_cases(batch, target) for _ in range(sets_for(0, target))]  # the most that any takes
    for first, *others in zip(*several, strict=True):
        yield [first, *others[: sets_for(first.moved_bytes, target) - 1]]
        if target.device == "cuda":
            torch.cuda.empty_cache()


def run(target: Target) -> None:
    for batch in batches(target):
        for sets in timed_sets(target, batch):
            first = sets[0]
            case = f"{first.name}, {first.shape}"
            with noted(target, "memory", case):
                with noted(target, "memory", f"{case}: check"):
                    on(target.backend, first.check)()
                moved = first.moved_bytes or 0
                source = torch.ones(max(1, moved // 8), device=target.device)
                aim = torch.empty_like(source)
                versions = {
                    "ours": [on(target.backend, one.versions["ours"]) for one in sets],
                    "plain": [one.versions["plain"] for one in sets],
                    "copy": [lambda aim=aim, source=source: aim.copy_(source)],
                }
                timings = medians(versions, target, seconds=0.2)
                for name, timing in timings.items():
                    share = timings["copy"]["us"] / timing["us"] if moved else None
                    target.add(
                        "memory", case, kind=first.name, batch=batch, version=name, moved_bytes=moved,
                        share_of_copy=None if share is None else round(share, 4), **timing,
                    )  # fmt: skip
