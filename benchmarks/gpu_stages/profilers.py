"""NVIDIA's tools on own kernels only: Nsight Compute's sections, compute-sanitizer's memcheck and racecheck."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu_stages.contract import small
from benchmarks.gpu_stages.target import Target, on
from mimkernels import testing
from mimkernels.commands.bench.cases.attention import Shape, packed_case
from mimkernels.commands.bench.cases.gathering import Size
from mimkernels.commands.bench.cases.mlp import bias_gelu
from mimkernels.commands.bench.cases.pooling import efficient_probing
from tests.cases import OPS, rich

_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "LaunchStats", "Occupancy")
_METRICS = ("Duration", "Compute (SM) Throughput", "Memory Throughput", "DRAM Throughput", "L2 Hit Rate",
            "Registers Per Thread", "Achieved Occupancy")  # fmt: skip
TOOLS = ("memcheck", "racecheck")
# Seconds that a tool may take: with what the stage imports before, less than the stage's own limit, at which no line of
# its end would be written.
SECONDS = {"ncu": 29, "memcheck": 24, "racecheck": 24}


def run_ncu(target: Target) -> None:
    command = [
        "ncu", "--clock-control", "none", "--kernel-name-base", "demangled", "--kernel-name", "regex:mimkernels",
        "--launch-count", "12", *(part for section in _SECTIONS for part in ("--section", section)), "--csv",
    ]  # fmt: skip
    output = _under(target, "ncu", command, "profiled", seconds=SECONDS["ncu"])
    if output is None:
        return
    (target.rest / "ncu.csv").write_text(output)
    for kernel, metrics in _metrics(output).items():
        target.add("ncu", kernel, **metrics)


def run_sanitizers(target: Target) -> None:
    for tool in TOOLS:
        # A filter by the kernel's name, without which every kernel of torch would be instrumented.
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", _name_filter("kns=mimkernels")]
        output = _under(target, tool, [part for part in command if part], "small", seconds=SECONDS[tool])
        for line in (output or "").splitlines():
            if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line:
                target.add("sanitizer", tool, summary=line.strip("= "))


def profiled(target: Target) -> None:
    """Once each: attention forward and backward at N = 197, bias + GELU, pooling with 32 queries."""
    dtype, device = target.dtype, target.device
    shape = Shape(1, 1, 10, 16) if target.rehearsal else Shape(256, 12, 197, 64)
    size = Size(batch=2, tokens=16, dim=32, keep=4, patch=4) if target.rehearsal else Size(batch=64)
    rows = (32, 64) if target.rehearsal else (64 * 196, 3072)
    for benchmark in (
        packed_case(shape, dtype, device),
        bias_gelu(rows, dtype, device, backward=False, compiled=False),
        efficient_probing(size, dtype, device, backward=True, compiled=False),
    ):
        on(target.backend, benchmark.versions["ours"])()
    target.synchronize()


def small_cases(target: Target) -> None:
    """Of every op one small case, forward and backward."""
    chosen = list(one_each(target))
    for case in chosen[:3] if target.rehearsal else chosen:
        dtype = torch.bfloat16 if torch.bfloat16 in case.dtypes else case.dtypes[0]
        testing.run(case, case.inputs(dtype, target.device), target.backend)
    target.synchronize()
    print(f"{len(chosen)} cases ran")


def one_each(target: Target) -> Iterator[testing.Case]:
    """The case with the most options of every op with CUDA C++ kernels, where it is small."""
    yield from (rich(op) for op in OPS if target.backend in testing.backends(op) and small(rich(op)))


def _under(target: Target, name: str, command: list[str], what: str, seconds: int) -> str | None:
    """Output of this program's part `what` under a tool, or None; without the tool, a rehearsal runs it alone."""
    there = shutil.which(command[0])
    if there is None:
        target.add("tools", name, missing=f"{command[0]} is not on the PATH")
        if not target.rehearsal:
            return None
        command = []
    part = [sys.executable, "-m", "benchmarks", "gpu", "--stage", what, "--output", str(target.output)]
    part += ["--rehearse"] if target.rehearsal else []
    target.rest.mkdir(exist_ok=True)
    log = target.rest / f"{name}.txt"
    with log.open("w") as file:
        try:
            status = subprocess.run(
                [*command, *part], stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
    output = log.read_text(errors="replace")
    target.add("tools", name, status=status, command=" ".join(command), tail=output[-600:])
    return output if there else None


def _name_filter(value: str) -> str:
    """The option as this version spells it."""
    if shutil.which("compute-sanitizer") is None:
        return ""
    words = subprocess.run(["compute-sanitizer", "--help"], capture_output=True, text=True).stdout
    option = next((name for name in ("--kernel-name", "--kernel-regex", "--filter") if name in words), None)
    return "" if option is None else f"{option}={value}"


def _metrics(output: str) -> dict[str, dict[str, str]]:
    """By kernel and launch the figures that matter, from the tool's CSV."""
    start = re.search(r'^"ID"', output, re.MULTILINE)
    if start is None:
        return {}
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO(output[start.start() :])):
        if row.get("Metric Name") in _METRICS:
            kernel = f"{row['ID']}: {Path(row['Kernel Name']).name[:160]}"
            found.setdefault(kernel, {})[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return found
