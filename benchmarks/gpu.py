"""Builds, tests, sanitizes and times on an NVIDIA GPU: ``python -m benchmarks gpu`` (``make gpu``).

Builds the libraries in place, runs the contract tests on the device and every kernel once under compute-sanitizer, and
times every benchmark case, Triton against CUDA C++. Nothing is installed: torch, triton, numpy, pytest, cmake and ninja
must be there. Steps go on after a failure; each has its share of nine minutes. ``--dry-run`` builds what can be built
without a GPU, and lists and checks all that would run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 540  # in all
TESTS = ("tests/test_contract.py", "tests/ops")
SELECTED = "cuda or triton"
SANITIZERS = ("memcheck", "racecheck")
DTYPES = ("bfloat16", "float32")


@dataclass
class Step:
    """One thing to do: what it runs, and the most seconds it may take."""

    name: str
    command: list[str]
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)


def steps(output: Path) -> list[Step]:
    """What is run, in order; the sum of the time limits is ``SECONDS``."""
    python = sys.executable
    tests = [python, "-m", "pytest", "-q", "--no-header", "--maxfail=25", *TESTS, "-k", SELECTED]
    if _has("xdist"):
        tests += ["-n", str(min(8, os.cpu_count() or 1))]
    planned = [
        Step(
            "build",
            [python, "setup.py", "-q", "build_native", "--inplace"],
            150,
            {"MIMKERNELS_BUILD": "require", "MIMKERNELS_CMAKE_ARGS": _architecture_argument()},
        ),
        Step("tests", tests, 150),
    ]
    for tool in SANITIZERS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", python, "-m", "benchmarks", "gpu"]
        planned.append(Step(f"sanitizer-{tool}", [*command, "--kernels-once"], 40))
    bench = [python, "-m", "mimkernels", "bench", "run", "--seconds", "0.5", "--no-compile", "--output", str(output)]
    groups = ["--group", "gathering", "pooling", "mlp", "norm", "attention"]
    planned.append(Step("benchmarks", [*bench, "--backends", *groups, "--dtype", *DTYPES], 90))
    step = ["--group", "calls", "step", "--model", "vit_base_patch16_224", "--compile-step", "--dtype", "bfloat16"]
    planned.append(Step("whole-step", [*bench, *step], 70))
    assert sum(step.seconds for step in planned) <= SECONDS
    return planned


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="build, list and check everything; run nothing on a GPU")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu", help="folder of logs, JSON and summary")
    parser.add_argument("--kernels-once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kernels_once:
        return run_kernels_once()
    options.output.mkdir(parents=True, exist_ok=True)
    plan = steps(options.output)
    return dry_run(plan) if options.dry_run else run(plan, options.output)


def run(plan: list[Step], output: Path) -> int:
    """Run the steps, one log each, and write ``summary.json`` and ``summary.txt``."""
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device is visible to torch; --dry-run checks everything that needs none", file=sys.stderr)
        return 2
    began, results = time.monotonic(), []
    for step in plan:
        left = SECONDS - (time.monotonic() - began)
        results.append(_run_step(step, output, min(step.seconds, left)))
        _write_summary(results, output)
    print((output / "summary.txt").read_text())
    return 0 if all(result["rc"] == 0 for result in results) else 1


def _run_step(step: Step, output: Path, seconds: float) -> dict:
    print(f"==> {step.name} (at most {seconds:.0f} s)", flush=True)
    start = time.monotonic()
    log = output / f"{step.name}.log"
    with log.open("w") as file:
        try:
            rc = subprocess.run(
                step.command,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **step.environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, seconds),
            ).returncode
        except subprocess.TimeoutExpired:
            rc = 124
        except FileNotFoundError as error:
            rc = 127
            file.write(f"{error}\n")
    tail = log.read_text(errors="replace").splitlines()[-12:]
    print("\n".join(tail))
    return {"step": step.name, "rc": rc, "seconds": round(time.monotonic() - start, 1), "tail": tail}


def _write_summary(results: list[dict], output: Path) -> None:
    import torch

    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    (output / "summary.json").write_text(json.dumps({"machine": about, "steps": results}, indent=1) + "\n")
    lines = [f"{about['device']}, torch {about['torch']}"]
    lines += [f"{r['step']:22} {_verdict(r['rc']):12} {r['seconds']:7.1f} s  {_count(r['tail'])}" for r in results]
    (output / "summary.txt").write_text("\n".join(lines) + "\n")


def _verdict(rc: int) -> str:
    return {0: "passed", 124: "out of time", 127: "not found"}.get(rc, f"failed ({rc})")


def _count(tail: list[str]) -> str:
    """The line that counts: pytest's or the sanitizer's last one."""
    counts = [line for line in tail if re.search(r"\d+ (passed|failed|error)|ERROR SUMMARY", line)]
    return counts[-1].strip("= ") if counts else ""


def dry_run(plan: list[Step]) -> int:
    """Build, and check that each step has what it runs; nothing needs a GPU."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("build", lambda: _succeeds(plan[0])),
        ("tests", _collected),
        ("kernels", lambda: f"{len(kernel_cases())} cases of ops with a cuda row"),
        ("benchmarks", _listed),
        ("sanitizer", _sanitizer),
    ]
    for step in plan:
        print(f"{step.name:22} at most {step.seconds:3} s   {' '.join(_readable(step.command))}")
    failed = 0
    for name, check in checks:
        try:
            print(f"{name:22} {check()}")
        except (AssertionError, subprocess.CalledProcessError) as error:
            failed += 1
            print(f"{name:22} FAILED: {error}\n{getattr(error, 'stdout', '') or ''}")
    return 1 if failed else 0


def _readable(command: list[str]) -> list[str]:
    return [Path(part).name if part == sys.executable else part for part in command]


def _succeeds(step: Step) -> str:
    environment = {**os.environ, **step.environment}
    subprocess.run(
        step.command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    built = json.loads((ROOT / "mimkernels" / "_lib" / "build.json").read_text())
    assert (ROOT / "mimkernels" / "_lib" / "libmimkernels_cuda.so").exists(), f"no CUDA library: {built}"
    return f"libraries built, CUDA for {built.get('cuda_architectures', '?')}"


def _collected() -> str:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *TESTS, "-k", SELECTED]
    collected = subprocess.run(
        command, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return collected.stdout.strip().splitlines()[-1]


def _listed() -> str:
    import torch

    from mimkernels.commands.bench.cases.attention import attention_cases
    from mimkernels.commands.bench.cases.gathering import Size, gathering_cases
    from mimkernels.commands.bench.cases.pooling import pooling_cases

    names = [
        case.name
        for cases in (gathering_cases, pooling_cases)
        for case in cases(Size(batch=1), torch.float32, "cpu", compiled=False)
    ]
    names += [f"{case.name}, {case.shape}" for case in attention_cases(torch.float32, "cpu")]
    return f"{len(names)} cases in each of {', '.join(DTYPES)}"


def _sanitizer() -> str:
    path = shutil.which("compute-sanitizer")
    return path or "compute-sanitizer is not on the PATH here (it comes with the CUDA toolkit)"


def kernel_cases() -> list:
    """One small case of every op that has CUDA kernels, per option that reaches other kernels."""
    from mimkernels import testing
    from tests.cases import cases

    return [case for case in cases() if "cuda" in testing.backends(case.op) and _is_small(case)]


def _is_small(case) -> bool:
    import torch

    sizes = [value.numel() for value in case.inputs(torch.float32).values() if isinstance(value, torch.Tensor)]
    return max(sizes, default=0) < 20_000


def run_kernels_once() -> int:
    """Every CUDA kernel once, forward and backward, on small shapes: what compute-sanitizer watches."""
    import torch

    from mimkernels import testing

    for case in kernel_cases():
        for dtype in case.dtypes:
            testing.run(case, case.inputs(dtype, "cuda"), "cuda")
    torch.cuda.synchronize()
    print(f"{len(kernel_cases())} cases ran")
    return 0


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _architecture_argument() -> str:
    """Only the device's own architecture, so that the build takes a third of the time; all of them without a device."""
    import torch

    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    name = f"{major}{minor}" + ("a" if major == 9 else "")
    return f"-DMIMKERNELS_CUDA_ARCHITECTURES={name}-real"
