"""Attention of the CUDA C++ kernels against every backend of ``scaled_dot_product_attention``."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_stages.target import Call, Target, medians, noted, on, sets_for
from mimkernels.commands.bench.cases.attention import Shape, attention_case, packed_case
from mimkernels.commands.bench.timing import Benchmark

# ViT-B on all patches at 224 pixels, on the visible ones, at 384 pixels; the decoder of MAE.
SHAPES = (Shape(256, 12, 197, 64), Shape(256, 12, 50, 64), Shape(256, 12, 577, 64), Shape(256, 16, 197, 32))
_REHEARSED = (Shape(1, 1, 10, 16),)
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def shapes(target: Target) -> tuple[Shape, ...]:
    return _REHEARSED if target.rehearsal else SHAPES


def kinds(shape: Shape, target: Target) -> dict[str, Callable[[], Benchmark]]:
    """What is timed of a shape, by name; each call makes inputs of its own."""
    dtype, device = target.dtype, target.device
    return {
        "forward": lambda: attention_case(shape, dtype, device, backward=False),
        "packed forward + backward": lambda: packed_case(shape, dtype, device),
        "forward + backward": lambda: attention_case(shape, dtype, device, backward=True),
    }


# Versions of ours by the names that lines have; those of the packed case have no statistics.
OURS = {
    "forward": {"bare": "bare", "all statistics": "ours", "entropy": "entropy"},
    "packed forward + backward": {"bare": "ours"},
    "forward + backward": {"bare": "bare", "all statistics": "ours"},
}

# Kernels beside those that a call takes: the variable that chooses them, and what it calls them.
_FORWARD, _BACKWARD = "MIMKERNELS_CUDA_ATTENTION", "MIMKERNELS_CUDA_ATTENTION_BWD"
KERNELS = {
    "forward": ((_FORWARD, "one-strip"),),
    "packed forward + backward": ((_BACKWARD, "two-passes"),),
    "forward + backward": ((_BACKWARD, "two-passes"),),
}


def run(target: Target) -> None:
    for shape, kind, sets in timed_sets(target):
        case = f"{kind}, {shape}"
        with noted(target, "attention", case):
            with noted(target, "attention", f"{case}: check"):
                on(target.backend, sets[0].check)()
            versions: dict[str, list[Call]] = {
                name: [on(target.backend, one.versions[version]) for one in sets]
                for name, version in OURS[kind].items()
            }
            for variable, kernel in KERNELS[kind]:
                with noted(target, "attention", f"{case}: check, {kernel}"):
                    _with_kernel(variable, kernel, on(target.backend, sets[0].check))()
                for name in OURS[kind]:
                    versions[f"{name}, {kernel}"] = [_with_kernel(variable, kernel, call) for call in versions[name]]
            for name, backend in SDPA.items():
                calls = [functools.partial(_sdpa, backend, one.versions["sdpa"]) for one in sets]
                if name == "math" and not target.rehearsal:
                    continue  # writes the matrix: no yardstick
                try:
                    calls[0]()
                except RuntimeError as error:
                    target.add("attention", case, version=name, missing=str(error)[:200])
                else:
                    versions[name] = calls
            for name, timing in medians(versions, target).items():
                rate = (sets[0].flops or 0) / timing["us"] / 1e6
                target.add(
                    "attention", case, kind=kind, shape=str(shape), version=name, tflops=round(rate, 3), **timing
                )


def timed_sets(target: Target) -> Iterator[tuple[Shape, str, list[Benchmark]]]:
    """Every shape and kind with the sets of inputs that take turns."""
    for shape in shapes(target):
        moved = 8 * shape.batch * shape.heads * shape.tokens * shape.dim  # q, k, v and the result in 16 bits
        for kind, make in kinds(shape, target).items():
            yield shape, kind, [make() for _ in range(sets_for(moved, target))]
            if target.device == "cuda":
                torch.cuda.empty_cache()


def _with_kernel(variable: str, kernel: str, call: Call) -> Call:
    def run() -> object:
        os.environ[variable] = kernel
        try:
            return call()
        finally:
            del os.environ[variable]

    return run


def _sdpa(backend: SDPBackend, call: Call) -> object:
    with sdpa_kernel([backend]):
        return call()
