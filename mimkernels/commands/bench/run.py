"""``mimkernels bench run``: every declared case on this machine, to the terminal and to JSON."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

import mimkernels
from mimkernels.commands.bench.cases.attention import attention_cases
from mimkernels.commands.bench.cases.calls import CALLS, call_cases
from mimkernels.commands.bench.cases.gathering import Size, gathering_cases
from mimkernels.commands.bench.cases.masks import mask_cases
from mimkernels.commands.bench.cases.mlp import mlp_cases
from mimkernels.commands.bench.cases.norm import norm_cases
from mimkernels.commands.bench.cases.pooling import pooling_cases
from mimkernels.commands.bench.cases.scaling import scaling_cases
from mimkernels.commands.bench.cases.segmentation import segmentation_cases
from mimkernels.commands.bench.results import machine, output_folder, save
from mimkernels.commands.bench.timing import Benchmark, Timing, measure, prepare

DTYPES = ("float32", "bfloat16", "float16")


class Group(NamedTuple):
    """Cases that are shown in one table and saved in one file."""

    title: str
    columns: str  # heading of what `line` gives
    cases: Callable[[argparse.Namespace, torch.dtype, str], Iterator[Benchmark]]
    line: Callable[[Timing], str]


def _by_size(cases: Callable[..., Iterator[Benchmark]]) -> Callable[..., Iterator[Benchmark]]:
    def of(options: argparse.Namespace, dtype: torch.dtype, device: str) -> Iterator[Benchmark]:
        return cases(Size(batch=options.batch or 64), dtype, device, compiled=not options.no_compile)

    return of


def _steps(options: argparse.Namespace, dtype: torch.dtype, device: str) -> Iterator[Benchmark]:
    from mimkernels.commands.bench.cases.simmim import MODELS, simmim_case  # timm
    from mimkernels.commands.bench.cases.step import Step, step_cases

    for model in options.model or (*(f"vit_{size}_patch16_224" for size in ("small", "base", "large")), *MODELS):
        step = Step(model, options.batch or (8 if device == "cpu" else 256), dtype, device, options.compile_step)
        if model.startswith("vit_"):
            yield from step_cases(step)
        else:
            yield simmim_case(step)


def _models(options: argparse.Namespace, dtype: torch.dtype, device: str) -> Iterator[Benchmark]:
    from mimkernels.commands.bench.cases.models import model_cases  # timm
    from mimkernels.commands.bench.cases.step import Step

    for model in options.model or ("vit_base_patch16_224",):
        yield from model_cases(Step(model, options.batch or (8 if device == "cpu" else 128), dtype, device))


def _windows(options: argparse.Namespace, dtype: torch.dtype, device: str) -> Iterator[Benchmark]:
    from mimkernels.commands.bench.cases.windows import window_cases  # timm

    yield from window_cases(options.batch or (8 if device == "cpu" else 128), dtype, device)


def _memory_line(timing: Timing) -> str:
    share = timing.share_of_copy
    libraries = [f"{name} {timing.ratio(name):.1f}x" for name in ("lightly", "timm") if name in timing.median]
    return (
        f"{timing.median['ours'] * 1e3:7.2f} ms {_times(timing.ratio('plain'))} {_times(timing.ratio('compiled')):>9}"
        + (f"{share:9.0%}" if share else " " * 9)
        + f"  {', '.join(libraries)}"
    ).rstrip()


def _attention_line(timing: Timing) -> str:
    def share(version: str, width: int) -> str:
        known = version in timing.median
        return f"{timing.median[version] / timing.median['sdpa']:{width}.2f}" if known else " " * width

    columns = (("ours", 8), ("entropy", 8), ("bare", 8), ("plain", 13))
    shares = " ".join(share(version, width) for version, width in columns)
    return f"{timing.median['ours'] * 1e3:7.2f} ms {shares} {timing.share_of_gemm:8.0%}"


def _scaling_line(timing: Timing) -> str:
    memory = ", ".join(f"{name} {most / 2**20:,.1f} MiB" for name, most in timing.extra["peak_bytes"].items())
    images = timing.extra.get("images")
    other = timing.ratio("sdpa") or timing.ratio("plain")
    each = f"  {timing.median['ours'] / images * 1e6:.1f} us per image," if images else ""
    return f"{timing.median['ours'] * 1e3:7.2f} ms {_times(other)}{each}  {memory}"


def _step_line(timing: Timing) -> str:
    images = timing.extra["images"]
    lines = [
        f"{timing.median['ours']:7.3f} s  {timing.ratio('plain'):7.2f}x "
        f"{images / timing.median['ours']:9.2f} {images / timing.median['plain']:9.2f}"
    ]
    if "compiled" in timing.median:
        rates = (images / timing.median[name] for name in ("ours, compiled", "compiled"))
        lines.append("    under torch.compile {:.2f} images/s, the published code {:.2f}".format(*rates))
    for name, parts in timing.extra.get("breakdown_ms", {}).items():
        whole = sum(parts.values())
        shares = ", ".join(f"{kind} {ms:,.0f}" for kind, ms in parts.items())
        lines.append(f"    {name:6} of {whole:,.0f} ms: {shares}")
    return "\n".join(lines)


def _call_line(timing: Timing) -> str:
    ours, native, door = (timing.median[name] / CALLS * 1e6 for name in ("ours", "native", "native through torch.ops"))
    return f"{ours:7.2f} us {native:9.2f} us {ours / native:7.1f} {door:14.2f} us {ours / door:7.1f}"


def _times(ratio: float | None) -> str:
    return f"{ratio:7.1f}x" if ratio else ""


_MEMORY_COLUMNS = f"{'ours':>10} {'plain':>8} {'compiled':>9} {'of copy':>8}  others"

GROUPS = {
    "gathering": Group(
        "moving tokens, and the loss",
        _MEMORY_COLUMNS,
        _by_size(gathering_cases),
        _memory_line,
    ),
    "pooling": Group("pooling of patch tokens", _MEMORY_COLUMNS, _by_size(pooling_cases), _memory_line),
    "mlp": Group(
        "bias and GELU of an MLP",
        _MEMORY_COLUMNS,
        lambda options, dtype, device: mlp_cases(dtype, device, compiled=not options.no_compile),
        _memory_line,
    ),
    "segmentation": Group(
        "cross-entropy of resized logits",
        _MEMORY_COLUMNS,
        lambda options, dtype, device: segmentation_cases(dtype, device, compiled=not options.no_compile),
        _memory_line,
    ),
    "norm": Group(
        "residual stream and LayerNorm between two branches",
        _MEMORY_COLUMNS,
        lambda options, dtype, device: norm_cases(dtype, device, compiled=not options.no_compile),
        _memory_line,
    ),
    "attention": Group(
        "attention with all statistics; times are of SDPA without any",
        f"{'ours':>10} {'of SDPA':>8} {'entropy':>8} {'none':>8} {'materialised':>13} {'of GEMM':>8}",
        lambda options, dtype, device: attention_cases(dtype, device),
        _attention_line,
    ),
    "step": Group(
        "a training step of MAE (ViT) and SimMIM (others) against the published code's",
        f"{'ours':>9}  {'plain':>8} {'images/s':>9} {'plain':>9}",
        _steps,
        _step_line,
    ),
    "models": Group(
        "a timm model under mimkernels.accelerate, against itself",
        f"{'ours':>9}  {'stock':>8} {'images/s':>9} {'stock':>9}",
        _models,
        _step_line,
    ),
    "windows": Group(
        "timm's window attention under mimkernels.accelerate, against itself",
        f"{'ours':>10} {'stock':>8}  peak memory",
        _windows,
        _scaling_line,
    ),
    "calls": Group(
        "cost of a call on tiny inputs, beside a native op",
        f"{'ours':>10} {'native':>12} {'ratio':>7} {'by torch.ops':>17} {'ratio':>7}",
        lambda options, dtype, device: call_cases(dtype, device),
        _call_line,
    ),
    "masks": Group(
        "block masks, on one core of the host",
        _MEMORY_COLUMNS,
        lambda options, dtype, device: mask_cases(),
        _memory_line,
    ),
    "scaling": Group(
        "growth with batch, mask ratio and tokens",
        f"{'ours':>10} {'plain':>8}  peak memory",
        lambda options, dtype, device: scaling_cases(dtype, device),
        _scaling_line,
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--group", nargs="+", default=list(GROUPS), choices=GROUPS, metavar="NAME",
                        help=f"tables: {', '.join(GROUPS)} (default: all)")  # fmt: skip
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES, metavar="NAME",
                        help=f"of the inputs: {', '.join(DTYPES)} (default: float32)")  # fmt: skip
    parser.add_argument("--batch", type=int, metavar="N", help="images (default: 64; a step: 8, on a GPU 256)")
    parser.add_argument("--model", nargs="+", metavar="NAME", help="timm names (default: a step of MAE with ViT-S, B "
                        "and L, of SimMIM with BEiT-B and Swin-B; models: ViT-B)")  # fmt: skip
    parser.add_argument("--only", metavar="TEXT",
                        help="run the cases whose name contains this; nothing is saved without --output")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=4.0, metavar="X",
                        help="measuring time per case (default: 4)")  # fmt: skip
    parser.add_argument("--no-compile", action="store_true", help="leave the torch.compile baseline out")
    parser.add_argument("--compile-step", action="store_true", help="also time the whole step under torch.compile")
    parser.add_argument("--backends", action="store_true", help="also time each backend that takes the inputs by name")
    parser.add_argument("--output", type=output_folder, metavar="DIR", help="folder of the JSON, one file for each "
                        "group and dtype, written anew after every case "
                        "(default: benchmarks/results/<device>)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Measure and save; the exit status."""
    if options.batch is not None and options.batch < 1:
        return _refuse(f"--batch must be at least 1, got {options.batch}")
    if not options.seconds > 0:
        return _refuse(f"--seconds must be positive, got {options.seconds}")
    device = _device()
    # Above every level: torch's profiler, which measures memory, writes lines of its own between the rows.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    prepare()
    about = machine(device)
    print(f"{about['device']}, torch {about['torch']}" + (f", {about['threads']} threads" if device == "cpu" else ""))
    counts = [_measure(group, dtype, about, options) for dtype in options.dtype for group in options.group]
    if options.only and not any(counts):
        return _refuse(f"no case of {', '.join(options.group)} has {options.only!r} in its name")
    return 0


def _refuse(reason: str) -> int:
    print(f"mimkernels bench run: {reason}", file=sys.stderr)
    return 2


def _measure(group: str, dtype: str, about: dict, options: argparse.Namespace) -> int:
    """Measure a group, and save it after every case; how many cases there were."""
    title, columns, cases, line = GROUPS[group]
    device, saved = _device(), options.output or not options.only
    timings: list[Timing] = []
    for benchmark in cases(options, getattr(torch, dtype), device):
        if options.only and options.only not in benchmark.name:
            continue
        if not timings:
            print(f"\n{dtype}, {title}; medians of interleaved rounds\n{'case':82} {columns}")
        if options.backends:
            benchmark.versions.update(_by_backend(benchmark.versions["ours"], device))
        timing = measure(benchmark, device, dtype, options.seconds)
        timings.append(timing)
        print(f"{timing.name + ', ' + timing.shape:82} {line(timing)}{_backend_times(timing)}", flush=True)
        if saved:
            save(timings, about, f"{group}-{dtype}", options.output, complete=False)
        del benchmark
        gc.collect()
    if timings and saved:
        print(f"written: {save(timings, about, f'{group}-{dtype}', options.output, complete=True)}")
    return len(timings)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _by_backend(ours: Callable[[], object], device: str) -> dict[str, Callable[[], object]]:
    """Our version on each kernel backend of the device that takes the inputs, by backend."""
    versions: dict[str, Callable[[], object]] = {}
    for name in ("triton", "cuda") if device == "cuda" else ("cpu",):

        def run(name: str = name) -> object:
            with mimkernels.use_backend(name):
                return ours()

        try:
            run()
        except NotImplementedError:
            continue
        versions[name] = run
    return versions


def _backend_times(timing: Timing) -> str:
    named = [
        f"{name} {timing.median[name] * 1e3:.3f} ms" for name in ("triton", "cuda", "cpu") if name in timing.median
    ]
    return f"   {', '.join(named)}" if named else ""
