"""The contract's cases on the CUDA C++ kernels in plain loops, a line per case; nothing is compiled on the way.

Worker processes take the cases, those with the most options first: where a kernel takes the device away from its
process, the next worker goes on behind it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import torch

from benchmarks.gpu_stages.target import Target, lost, read
from mimkernels import testing
from tests.cases import OPS, cases, rich

_MOST_NUMBERS = 20_000  # of a tensor that emulation, or an instrumented kernel, gets
_REHEARSED = 12


def run(target: Target) -> None:
    finished = False
    while not finished:
        before = len(done(target))
        command = [sys.executable, "-m", "benchmarks", "gpu", "--stage", "contract-worker", "--output", target.output]
        status = subprocess.run([*map(str, command), *(["--rehearse"] if target.rehearsal else [])]).returncode
        finished = status == 0
        if not finished and len(done(target)) == before:
            raise RuntimeError(f"the worker ended with status {status} and did no case")


def work(target: Target) -> None:
    """Every case that has no line yet, in every dtype."""
    known = done(target)
    for case, dtype in planned(target):
        name = f"{case}-{str(dtype)[6:]}"
        if name in known:
            continue
        # A kernel may take the process with it: the line is there before.
        target.add("contract", name, state="begun", op=case.op)
        try:
            testing.check(case, target.backend, dtype, target.device)
            target.synchronize()
        except Exception as error:
            state = "wrong" if isinstance(error, AssertionError) else "failed"
            target.add("contract", name, state=state, op=case.op, error=f"{type(error).__name__}: {str(error)[:600]}")
            if lost(error):
                raise
        else:
            target.add("contract", name, state="right", op=case.op)


def done(target: Target) -> set[str]:
    """Cases that have been begun at least."""
    if not target.results.exists():
        return set()
    return {line["case"] for line in read(target.results) if line["stage"] == "contract"}


def planned(target: Target) -> Iterator[tuple[testing.Case, torch.dtype]]:
    """Cases in the order that they run in: of every op the one with the most options, then the others."""
    ops = [op for op in OPS if target.backend in testing.backends(op)]
    first = [rich(op) for op in ops]
    others = [case for op in ops for case in cases(op) if case not in first]
    pairs = [(case, dtype) for case in [*first, *others] for dtype in case.dtypes]
    pairs.sort(key=lambda pair: (pair[0] not in first, pair[1] != torch.bfloat16))
    if target.rehearsal:
        pairs = [pair for pair in pairs if small(pair[0])][:_REHEARSED]
    yield from pairs


def small(case: testing.Case) -> bool:
    """Whether emulation, or an instrumented kernel, gets through the case soon."""
    sizes = [value.numel() for value in case.inputs(torch.float32).values() if isinstance(value, torch.Tensor)]
    return max(sizes, default=0) < _MOST_NUMBERS
