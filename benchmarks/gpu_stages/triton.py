"""Triton's kernels: compiled by many processes at once, then checked and timed against the CUDA C++ ones."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks import tune_attention
from benchmarks.gpu_stages import attention, memory
from benchmarks.gpu_stages.target import Call, Target, medians, noted, on
from mimkernels.commands.bench.timing import Benchmark
from mimkernels.ops.attention import triton_configs, triton_table

_PROCESSES = 14
_COMPILING = 70.0  # seconds at most, so that most cases are timed even where a kernel takes its compiler ages
_REHEARSED = (
    "forward",
    "add_layer_norm, forward",
    "restore_tokens + positions",
    "reduce_pool, mean, forward + backward",
)
# Attention's forward kernel in 16 bits without statistics, head dims to 64: block sizes beside the committed ones.
_BLOCKS = {
    64: ((64, 64, 4, 1), (32, 64, 4, 1), (64, 64, 8, 1)),
    256: ((128, 256, 8, 1), (64, 256, 8, 1), (64, 64, 4, 2), (64, 256, 4, 1)),
    triton_configs.ANY: ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)),
}
_TRITON = "triton"


def run(target: Target) -> None:
    _compile(target)
    for case, kind, sets in _timed_sets(target):
        with noted(target, "triton", case):
            with noted(target, "triton", f"{case}: check"):
                on(_TRITON, sets[0].check)()
            versions: dict[str, list[Call]] = {
                backend: [on(backend, one.versions["ours"]) for one in sets] for backend in (_TRITON, target.backend)
            }
            if "bare" in sets[0].versions:
                versions |= {
                    f"{backend}, bare": [on(backend, one.versions["bare"]) for one in sets]
                    for backend in (_TRITON, target.backend)
                }
            for name, timing in medians(versions, target, seconds=0.15).items():
                target.add("triton", case, kind=kind, version=name, **timing)
    for entry, blocks in _blocks(target):
        with noted(target, "triton", f"{entry}, {blocks}"):
            us = tune_attention.timed(entry, blocks) * 1e6
            committed = triton_table.TABLE.get(entry) == blocks
            target.add(
                "triton", f"{entry}, {blocks}", entry=str(entry), blocks=str(blocks), best_us=us, committed=committed
            )


def _blocks(target: Target) -> Iterator[tuple[tuple, tuple]]:
    """Entries of the table of block sizes with those that are tried, the committed ones first."""
    if target.rehearsal:
        return
    from mimkernels.ops.attention.triton_blocks import architecture

    arch = architecture(torch.device("cuda", 0))
    for length, tried in _BLOCKS.items():
        entry = ("forward", arch, "half", 64, length, False)
        committed = triton_table.TABLE.get(entry)
        for blocks in dict.fromkeys([*([committed] if committed else []), *tried]):
            yield entry, blocks


def compile_share(target: Target, share: int, shares: int) -> None:
    """Run every `shares`-th case once, so that its kernels lie in Triton's cache."""
    for number, (case, make) in enumerate(_cases(target)):
        if number % shares != share:
            continue
        one = make()
        began = time.monotonic()
        with noted(target, "triton", f"{case}: compile"):
            on(_TRITON, one.versions["ours"])()
            if "bare" in one.versions:
                on(_TRITON, one.versions["bare"])()
            target.synchronize()
        target.add("triton", f"{case}: compile", compile_s=round(time.monotonic() - began, 2))

    for number, (entry, blocks) in enumerate(_blocks(target)):
        if number % shares == share:
            with noted(target, "triton", f"{entry}, {blocks}: compile"):
                tune_attention.timed(entry, blocks)


def _compile(target: Target) -> None:
    shares = 2 if target.rehearsal else min(_PROCESSES, max(1, (os.cpu_count() or 2) - 2))
    began = time.monotonic()
    command = [sys.executable, "-m", "benchmarks", "gpu", "--output", str(target.output), "--stage"]
    extra = ["--rehearse"] if target.rehearsal else []
    workers = [
        subprocess.Popen([*command, f"triton-compile:{share}/{shares}", *extra], stdin=subprocess.DEVNULL)
        for share in range(shares)
    ]
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(None if target.rehearsal else max(0.0, began + _COMPILING - time.monotonic()))
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
    statuses = [worker.wait() for worker in workers]
    target.add("triton", "compile", processes=shares, statuses=statuses, s=round(time.monotonic() - began, 1))


def _cases(target: Target) -> Iterator[tuple[str, Callable[[], Benchmark]]]:
    """Every case that is timed, by its name, and what makes it: inputs of attention are made for whom they are run."""
    for shape in attention.shapes(target):
        for kind, make in attention.kinds(shape, target).items():
            if _taken(kind, target):
                yield f"{kind}, {shape}", make
    for batch in memory.batches(target):
        for one in memory.all_cases(batch, target):
            if _taken(one.name, target):
                yield f"{one.name}, {one.shape}", lambda one=one: one


def _timed_sets(target: Target) -> Iterator[tuple[str, str, list[Benchmark]]]:
    """Every case by its name and kind, with the sets of inputs that take turns."""
    for shape, kind, sets in attention.timed_sets(target):
        if _taken(kind, target):
            yield f"{kind}, {shape}", kind, sets
    for batch in memory.batches(target):
        for sets in memory.timed_sets(target, batch):
            if _taken(sets[0].name, target):
                yield f"{sets[0].name}, {sets[0].shape}", sets[0].name, sets


def _taken(kind: str, target: Target) -> bool:
    """Whether it is timed: of a rehearsal a few are."""
    return not target.rehearsal or kind in _REHEARSED
