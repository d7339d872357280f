"""Run the benchmarks on this machine: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.cases import Size, all_cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--only", help="run the cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=4.0, help="measuring time per case (default 4)")
    parser.add_argument("--no-compile", action="store_true", help="leave the torch.compile baseline out")
    parser.add_argument("--output", type=Path, help="folder of the JSON (default benchmarks/results/<device>)")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    harness.prepare()
    about = harness.machine(device)
    print(f"{about['device']}, torch {about['torch']}" + (f", {about['threads']} threads" if device == "cpu" else ""))
    for dtype_name in options.dtype:
        timings = []
        print(f"\n{dtype_name}, {Size(batch=options.batch)}, medians of interleaved rounds")
        print(f"{'case':57} {'ours':>10} {'plain':>8} {'compiled':>9} {'of copy':>8}")
        for benchmark in all_cases(
            Size(batch=options.batch), getattr(torch, dtype_name), device, compiled=not options.no_compile
        ):
            if options.only and options.only not in benchmark.name:
                continue
            timing = harness.measure(benchmark, device, dtype_name, options.seconds)
            timings.append(timing)
            print(_line(timing))
        if timings and not options.only:
            print(f"written: {harness.save(timings, device, f'gathering-{dtype_name}', options.output)}")


def _line(timing: harness.Timing) -> str:
    share = timing.share_of_copy
    compiled = timing.ratio("compiled")
    return (
        f"{timing.name:57} {timing.median['ours'] * 1e3:7.2f} ms {timing.ratio():7.1f}x "
        + (f"{compiled:8.1f}x" if compiled else " " * 9)
        + (f"{share:8.0%}" if share else "")
    )


if __name__ == "__main__":
    main()
