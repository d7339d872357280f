"""A whole training step of MAE, ours and the published code's, without a graph; where its time goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.gpu_stages.target import Target, noted
from mimkernels.commands.bench.cases.step import Step, kind_of, step_case

_MODEL = "vit_base_patch16_224"
_KERNELS = 40  # of the profile


def run(target: Target, *, compiled: bool = False) -> None:
    batches = (1,) if target.rehearsal else (256, 64)
    for batch in batches:
        model = "vit_tiny_patch16_224" if target.rehearsal else _MODEL
        step = Step(model, batch, target.dtype, target.device, compiled)
        case = f"MAE step, {step}"
        with noted(target, "step", case):
            benchmark = step_case(step)
            with noted(target, "step", f"{case}: check"):
                benchmark.check()
            for name, call in benchmark.versions.items():
                with noted(target, "step", f"{case}: {name}"):
                    target.add("step", case, version=name, images=batch, **_timed(call, target))
            for name, call in benchmark.versions.items():
                _profile(target, f"{case}, {name}", call)
        if target.device == "cuda":
            torch.cuda.empty_cache()


def _timed(call: Callable[[], object], target: Target) -> dict[str, float]:
    """Milliseconds of a step by the host's clock, launches included, as a training loop has it."""
    least, budget = (1, 0.0) if target.rehearsal else (8, 4.0)
    began = time.monotonic()
    call()
    target.synchronize()
    first = time.monotonic() - began
    for _ in range(least // 2):
        call()
    target.synchronize()
    taken: list[float] = []
    while len(taken) < least or (sum(taken) < budget and len(taken) < 50):
        start = time.perf_counter()
        call()
        target.synchronize()
        taken.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() / 2**20 if target.device == "cuda" else 0.0
    return {
        "ms": round(statistics.median(taken) * 1e3, 3),
        "fastest_ms": round(min(taken) * 1e3, 3),
        "rounds": len(taken),
        "first_s": round(first, 2),
        "peak_mib": round(memory, 1),
    }


def _profile(target: Target, case: str, call: Callable[[], object]) -> None:
    """The kernels that take longest, a line for each kind of work, all of them in the archive."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if target.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        call()
        target.synchronize()
    spent = "self_device_time_total" if target.device == "cuda" else "self_cpu_time_total"
    entries = sorted(profile.key_averages(), key=lambda entry: -getattr(entry, spent))
    kinds: dict[str, float] = {}
    for entry in entries:
        kinds[kind_of(entry.key)] = kinds.get(kind_of(entry.key), 0.0) + getattr(entry, spent) / 1e3
    lines = [f"{getattr(entry, spent):12.1f} us {entry.count:6} x {entry.key}" for entry in entries[:_KERNELS]]
    target.rest.mkdir(exist_ok=True)
    name = "".join(letter if letter.isalnum() else "-" for letter in case)
    (target.rest / f"profile-{name}.txt").write_text("\n".join(lines) + "\n")
    kernels = [[entry.key[:120], entry.count, round(getattr(entry, spent), 1)] for entry in entries[:_KERNELS]]
    target.add("step", f"{case}: profile", kinds_ms={k: round(v, 3) for k, v in kinds.items()}, kernels_us=kernels)
