"""A whole training step of MAE, ours and the published code's, and ours in a CUDA graph; where the time goes."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.gpu_stages.target import Target, noted
from mimkernels.commands.bench.cases.step import Step, kind_of, step_case
from mimkernels.models import MAE, captured_step

_MODEL = "vit_base_patch16_224"
_KERNELS = 40  # of the profile
_CAPTURED = "ours, captured"


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
            _in_a_graph(step, target, case, check=batch == batches[-1])
            for name, call in benchmark.versions.items():
                _profile(target, f"{case}, {name}", call)
        if target.device == "cuda":
            torch.cuda.empty_cache()


def run_compiled(target: Target) -> None:
    run(target, compiled=True)


def _in_a_graph(step: Step, target: Target, case: str, *, check: bool) -> None:
    """Our step as replays of a CUDA graph: its time; `check`: whether its losses are those of eager steps."""
    torch.manual_seed(0)
    size, options = (64, {"depth": 1, "decoder_depth": 1}) if target.rehearsal else (224, {})
    model = MAE.from_timm(step.model, img_size=size, **options).to(step.device)
    images = torch.randn(step.batch, 3, size, size, device=step.device)

    def steps_of(stand_in: bool) -> Callable[[], torch.Tensor]:
        copied = copy.deepcopy(model)
        weights = [weight for weight in copied.parameters() if weight.requires_grad]
        on_device = step.device == "cuda"
        optimizer = torch.optim.AdamW(
            weights, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.05, fused=True, capturable=on_device
        )
        dtype = None if step.dtype == torch.float32 else step.dtype
        take = captured_step(copied, optimizer, images, autocast=dtype, stand_in=stand_in)
        return lambda: take(images)

    with noted(target, "step", f"{case}: {_CAPTURED}"):
        replays = steps_of(target.rehearsal)
        target.add("step", case, version=_CAPTURED, images=step.batch, **_timed(replays, target))
    if check:
        with noted(target, "step", f"{case}: {_CAPTURED}: check"):
            calls = [steps_of(stand_in) for stand_in in (True, target.rehearsal)]
            eager, captured = (torch.stack([call() for _ in range(8)]).cpu() for call in calls)
            target.add(
                "step",
                f"{case}: {_CAPTURED}: check",
                same_bits=torch.equal(eager, captured),
                largest_difference=float((eager - captured).abs().max()),
                losses=captured.tolist(),
            )


def _timed(call: Callable[[], object], target: Target) -> dict[str, float]:
    """Milliseconds of a step by the host's clock, launches included, as a training loop has it."""
    least, budget = (1, 0.0) if target.rehearsal else (8, 4.0)
    if target.device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of this version, beside the models of the others
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
