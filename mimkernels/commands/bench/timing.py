"""Timing several versions of one computation side by side.

All versions run in one process, round by round in an order drawn anew, so that whatever else the machine does, and
whatever the version before left in the caches, hits all of them. Reported are medians. The limit of a memory-bound
case is a copy of as many bytes, that of a case with matrix products the rate of a large one, timed in the same rounds.
On a GPU a version is captured as a CUDA graph where it can be, so that the device is timed and not the launches.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from mimkernels.commands.bench.memory import peak_bytes
from mimkernels.engine.hardware import cpu_computes_bf16
from mimkernels.engine.memory import keep_freed_memory

#: Versions without our code: what runs are compared by.
YARDSTICKS = ("plain", "compiled", "sdpa", "xformers", "native", "copy", "gemm")
_BLOCKS = 10
_LONG = 15.0  # seconds of a round


@dataclass(kw_only=True)
class Benchmark:
    """One case: versions that compute the same thing, and the fewest bytes that any of them must move.

    Attributes:
        versions: what is timed, by name; ``"ours"`` is compared with each of the others.
        moved_bytes: each input read once plus each output written once, or None where a GEMM decides.
        flops: floating-point operations of the matrix products, 2 per multiply-add, or None.
        check: raises unless the versions agree; called once before timing.
        details: called once after timing; what it returns goes into the record.
        on_host: timed by the host's clock on a GPU too, without waiting: what launching costs.
    """

    name: str
    shape: str
    versions: dict[str, Callable[[], object]]
    moved_bytes: int | None = None
    flops: int | None = None
    check: Callable[[], None] = lambda: None
    details: Callable[[], dict] = dict
    on_host: bool = False


@dataclass
class Timing:
    """Seconds per call of each version, medians over rounds, with the middle half's spread."""

    name: str
    shape: str
    dtype: str
    median: dict[str, float]
    spread: dict[str, float]
    rounds: int
    relative: list[float] = field(default_factory=list)  # ours over the yardsticks' geometric mean, block by block
    moved_bytes: int | None = None
    flops: int | None = None
    matrix: int = 0  # size of the square matrices whose product is the version "gemm"
    extra: dict = field(default_factory=dict)

    def ratio(self, version: str) -> float | None:
        """How many times the time of ours the version takes."""
        return self.median[version] / self.median["ours"] if version in self.median else None

    @property
    def share_of_copy(self) -> float | None:
        """Time of a copy of the same bytes over the time of ours."""
        return self.median["copy"] / self.median["ours"] if "copy" in self.median else None

    @property
    def share_of_gemm(self) -> float | None:
        """The rate of ours, in floating-point operations per second, over the rate of a large matrix product."""
        if self.flops is None or "gemm" not in self.median:
            return None
        return (self.flops / self.median["ours"]) / (2 * self.matrix**3 / self.median["gemm"])

    def record(self) -> dict:
        return {
            "name": self.name,
            "shape": self.shape,
            "dtype": self.dtype,
            "rounds": self.rounds,
            "median_us": {k: round(v * 1e6, 1) for k, v in self.median.items()},
            "spread_us": {k: round(v * 1e6, 1) for k, v in self.spread.items()},
            "relative": [round(v, 5) for v in self.relative],
            "times_faster_than": {
                name: _rounded(self.ratio(name)) for name in self.median if name not in ("ours", "copy", "gemm")
            },
            "share_of_copy_bandwidth": _rounded(self.share_of_copy),
            "share_of_gemm_rate": _rounded(self.share_of_gemm),
            "moved_bytes": self.moved_bytes,
            "flops": self.flops,
            **self.extra,
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def measure(benchmark: Benchmark, device: str, dtype: str, seconds: float = 4.0) -> Timing:
    """Time all versions for about ``seconds``, interleaved, at least 7 rounds (3 of versions that take seconds)."""
    benchmark.check()
    versions = dict(benchmark.versions)
    matrix = (8192 if device == "cuda" else 1024) if benchmark.flops else 0  # large enough for the full rate
    if benchmark.moved_bytes:
        versions["copy"] = _copy_of(benchmark.moved_bytes, device)
    if benchmark.flops:
        versions["gemm"] = _matrix_product(matrix, device, dtype)
    on_device = device == "cuda" and not benchmark.on_host
    timer = _cuda_seconds if on_device else _cpu_seconds
    for run in versions.values():  # warm up: compile, grow the heap, fill the pools
        run()
    extra: dict[str, Any] = {}
    if on_device:
        graphs = {name: _captured(run) for name, run in versions.items()}
        extra["not_captured"] = [name for name, graph in graphs.items() if graph is None]
        versions = {name: graphs[name] or run for name, run in versions.items()}
    once = sum(timer(run) for run in versions.values())
    rounds = max(7 if once < _LONG else 3, min(400, int(seconds / once)))
    taken: dict[str, list[float]] = {name: [] for name in versions}
    shuffle = random.Random(0).shuffle
    order = list(versions)
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            taken[name].append(timer(versions[name]))
            if benchmark.on_host and device == "cuda":
                torch.cuda.synchronize()  # so that no launch waits for a full queue
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in taken.items()}
    if not benchmark.on_host:
        extra["peak_bytes"] = {name: peak_bytes(run, device) for name, run in benchmark.versions.items()}
    extra |= benchmark.details()
    return Timing(
        benchmark.name,
        benchmark.shape,
        dtype,
        median={name: q[1] for name, q in quartiles.items()},
        spread={name: q[2] - q[0] for name, q in quartiles.items()},
        rounds=rounds,
        relative=_relative(taken),
        moved_bytes=benchmark.moved_bytes,
        flops=benchmark.flops,
        matrix=matrix,
        extra=extra,
    )


def _relative(taken: dict[str, list[float]]) -> list[float]:
    """Time of ours over the geometric mean of the yardsticks of the same round, medians of consecutive rounds."""
    yardsticks = [taken[name] for name in YARDSTICKS if name in taken]
    if not yardsticks:
        return []
    by_round = [
        math.log(ours) - statistics.fmean(map(math.log, others))
        for ours, *others in zip(taken["ours"], *yardsticks, strict=True)
    ]
    blocks = min(_BLOCKS, len(by_round))
    edges = [len(by_round) * i // blocks for i in range(blocks + 1)]
    return [math.exp(statistics.median(by_round[a:b])) for a, b in itertools.pairwise(edges)]


def _copy_of(moved_bytes: int, device: str) -> Callable[[], object]:
    # A copy reads and writes every byte once: half of the moved bytes each way, into memory that is there already.
    source = torch.ones(moved_bytes // 8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _matrix_product(size: int, device: str, dtype: str) -> Callable[[], object]:
    # A CPU without instructions for 16 bits multiplies in fp32, whose rate is then the limit.
    if device == "cpu" and not (dtype == "bfloat16" and cpu_computes_bf16()):
        dtype = "float32"
    a, b = torch.randn(2, size, size, device=device).to(getattr(torch, dtype))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _captured(run: Callable[[], object]) -> Callable[[], object] | None:
    """The call as the replay of a CUDA graph, or None where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None

    def replay() -> object:
        graph.replay()
        return outputs  # kept alive: the graph writes there

    return replay


def runs(version: Callable[[], object]) -> bool:
    """Whether a baseline is installed and takes the inputs here."""
    try:
        version()
    except (ImportError, NotImplementedError):
        return False
    return True


def _cpu_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_seconds(run: Callable[[], object]) -> float:
    # L2 is filled with other data first, so that inputs come from device memory.
    torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda").zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def prepare() -> None:
    """Process-wide settings, the same for every version: freed memory is kept, as the trainer does."""
    keep_freed_memory()
    torch.manual_seed(0)
