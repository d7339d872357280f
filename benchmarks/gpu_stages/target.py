"""Where a stage runs, what it times with, and where its lines go."""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mimkernels

Call = Callable[[], object]

# What is timed reads inputs that are not in a cache of 50 MB: several sets of them take turns.
_SETS = ((64 * 2**20, 4), (200 * 2**20, 3))


@dataclass(frozen=True)
class Target:
    """A device, or what stands in for it in a rehearsal: the emulated kernels, on sizes that they manage.

    Attributes:
        output: folder of ``results.jsonl``.
        rehearsal: whether the emulation stands in.
    """

    output: Path
    rehearsal: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    @property
    def backend(self) -> str:
        """That of the CUDA C++ kernels."""
        return "cuda-emulated" if self.rehearsal else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        # Triton's interpreter gets products of bf16 wrong.
        return torch.float32 if self.rehearsal else torch.bfloat16

    @property
    def results(self) -> Path:
        return self.output / "results.jsonl"

    @property
    def rest(self) -> Path:
        """Folder of what goes into the archive, elsewhere: `output` holds few files at every moment."""
        name = f"mimkernels-gpu-{zlib.crc32(str(self.output).encode()):08x}"
        return Path(tempfile.gettempdir()) / name

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def add(self, stage: str, case: str, **values: Any) -> None:
        """Append one line to the results; it is on the disk when this returns."""
        line = {"stage": stage, "case": case, "at": round(time.time(), 2), **values}
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read(results: Path) -> list[dict]:
    """The lines of a run, without one that was cut in the middle."""
    lines = []
    for text in results.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def sets_for(moved_bytes: int | None, target: Target) -> int:
    """How many sets of inputs take turns, for a call that moves so many bytes; two in a rehearsal."""
    if target.rehearsal:
        return 2
    return next((sets for most, sets in _SETS if (moved_bytes or 0) < most), 2)


def rounds_for(once: float, seconds: float, target: Target) -> int:
    """How many rounds of `once` seconds fill `seconds`, from 5 to 60; two in a rehearsal, whose times say nothing."""
    return 2 if target.rehearsal else max(5, min(60, int(seconds / max(once, 1e-6))))


@contextlib.contextmanager
def noted(target: Target, stage: str, case: str) -> Iterator[None]:
    """Whatever a case raises becomes its line, and the stage goes on; a device that is lost ends it."""
    try:
        yield
    except Exception as error:
        target.add(stage, case, error=f"{type(error).__name__}: {str(error)[:400]}")
        if lost(error):
            raise


def lost(error: Exception) -> bool:
    """Whether the process can use its device no more."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("illegal memory access", "misaligned address", "unspecified launch failure",
                                  "device-side assert", "CUDA error: an illegal")
    )  # fmt: skip


def medians(versions: Mapping[str, Sequence[Call]], target: Target, seconds: float = 0.4) -> dict[str, dict[str, Any]]:
    """Microseconds of one call of each version, in turns in an order drawn anew for every round.

    Args:
        versions: by name, the same call on several sets of inputs.
        seconds: about so long, in 5 to 60 rounds.

    Returns:
        By version ``us`` (median), ``spread`` (of the middle half), ``rounds`` and ``graph``: on a device, whether a
        CUDA graph was replayed, so that launching is not timed.
    """
    timers = {name: _timer(calls, target) for name, calls in versions.items()}
    once = sum(timer() * len(versions[name]) for name, (timer, _) in timers.items())
    rounds = rounds_for(once, seconds, target)
    taken: dict[str, list[float]] = {name: [] for name in versions}
    order, shuffle = list(versions), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            taken[name].append(timers[name][0]())
    result: dict[str, dict[str, Any]] = {}
    for name, values in taken.items():
        low, middle, high = statistics.quantiles(values, n=4)
        result[name] = {
            "us": round(middle * 1e6, 2),
            "spread": round((high - low) * 1e6, 2),
            "rounds": rounds,
            "graph": timers[name][1],
        }
    return result


def _timer(calls: Sequence[Call], target: Target) -> tuple[Callable[[], float], bool | None]:
    """Seconds of one call, mean over the sets, and whether it is the replay of a graph; None on the host."""
    for call in calls:
        call()
    target.synchronize()
    if target.device != "cuda":

        def on_host() -> float:
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) / len(calls)

        return on_host, None
    graph = _captured(calls)

    def on_device() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        if graph is not None:
            graph.replay()
        else:
            for call in calls:
                call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(calls)

    return on_device, graph is not None


def _captured(calls: Sequence[Call]) -> Any:
    graph = torch.cuda.CUDAGraph()
    kept: list[object] = []
    try:
        # Backward runs on autograd's own thread, which another mode would not let launch.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            kept += [call() for call in calls]
    except RuntimeError as error:
        torch.cuda.synchronize()
        if lost(error):
            raise
        return None
    graph.kept = kept  # where it writes
    return graph


def on(backend: str, call: Call) -> Call:
    """The call with every op on one backend."""

    def run() -> object:
        with mimkernels.use_backend(backend):
            return call()

    return run
