"""Run the benchmarks on this machine: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

import mimkernels
from benchmarks import harness
from benchmarks.attention_cases import attention_cases
from benchmarks.cases import Size, all_cases
from benchmarks.pooling_cases import pooling_cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--only", help="run the cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=4.0, help="measuring time per case (default 4)")
    parser.add_argument("--no-compile", action="store_true", help="leave the torch.compile baseline out")
    parser.add_argument("--backends", action="store_true", help="also time each backend that takes the inputs by name")
    parser.add_argument("--output", type=Path, help="folder of the JSON (default benchmarks/results/<device>)")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    harness.prepare()
    about = harness.machine(device)
    print(f"{about['device']}, torch {about['torch']}" + (f", {about['threads']} threads" if device == "cpu" else ""))
    for dtype_name in options.dtype:
        dtype, size = getattr(torch, dtype_name), Size(batch=options.batch)
        print(f"\n{dtype_name}, {size}, medians of interleaved rounds")
        print(f"{'case':57} {'ours':>10} {'plain':>8} {'compiled':>9} {'of copy':>8}")
        for group, cases in (("gathering", all_cases), ("pooling", pooling_cases)):
            made = cases(size, dtype, device, compiled=not options.no_compile)
            _measure(made, group, dtype_name, device, options, _memory_line)
        print(f"\n{dtype_name}, attention with all statistics; times are of SDPA without any, medians")
        print(f"{'case':57} {'ours':>10} {'of SDPA':>8} {'entropy':>8} {'none':>8} {'materialised':>13} {'of GEMM':>8}")
        _measure(attention_cases(dtype, device), "attention", dtype_name, device, options, _attention_line)


def _measure(
    benchmarks: Iterable[harness.Benchmark],
    group: str,
    dtype_name: str,
    device: str,
    options: argparse.Namespace,
    line: Callable[[harness.Timing], str],
) -> None:
    timings = []
    for benchmark in benchmarks:
        if options.only and options.only not in benchmark.name:
            continue
        if options.backends:
            benchmark.versions.update(_by_backend(benchmark.versions["ours"], device))
        timings.append(harness.measure(benchmark, device, dtype_name, options.seconds))
        print(line(timings[-1]), flush=True)
    if timings and not options.only:
        print(f"written: {harness.save(timings, device, f'{group}-{dtype_name}', options.output)}")


def _by_backend(ours: Callable[[], object], device: str) -> dict[str, Callable[[], object]]:
    """Ours on each kernel backend of the device that takes it."""
    found = {}
    for name in ("triton", "cuda") if device == "cuda" else ("cpu",):

        def run(name: str = name) -> object:
            with mimkernels.use_backend(name):
                return ours()

        try:
            run()
        except NotImplementedError:
            continue
        found[name] = run
    return found


def _memory_line(timing: harness.Timing) -> str:
    share = timing.share_of_copy
    compiled = timing.ratio("compiled")
    return (
        f"{timing.name:57} {timing.median['ours'] * 1e3:7.2f} ms {timing.ratio('plain'):7.1f}x "
        + (f"{compiled:8.1f}x" if compiled else " " * 9)
        + (f"{share:8.0%}" if share else "")
        + _backend_times(timing)
    )


def _backend_times(timing: harness.Timing) -> str:
    named = [
        f"{name} {timing.median[name] * 1e3:.3f} ms" for name in ("triton", "cuda", "cpu") if name in timing.median
    ]
    return f"   {', '.join(named)}" if named else ""


def _attention_line(timing: harness.Timing) -> str:
    shares = (timing.median[name] / timing.median["sdpa"] for name in ("ours", "entropy", "bare", "plain"))
    return (
        f"{timing.name + ', ' + timing.shape:57} {timing.median['ours'] * 1e3:7.2f} ms "
        + " ".join(f"{share:{width}.2f}" for share, width in zip(shares, (8, 8, 8, 13), strict=True))
        + f" {timing.share_of_gemm:8.0%}"
        + _backend_times(timing)
    )


if __name__ == "__main__":
    main()
