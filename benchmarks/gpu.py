"""Learns everything about the kernels on an NVIDIA GPU in 450 seconds: ``python -m benchmarks gpu`` (``make gpu``).

Stages run in their order, each in a process group of its own that is killed at its limit. Every finished case is a
line of ``results.jsonl`` at once; ``log.txt`` has what was printed, ``rest.tar.gz`` profiles and the like, renewed
after every stage; ``report.md`` is what the lines say. Nothing is installed, and nothing is built where the library
loads: torch, triton, numpy and timm must be there.

    python -m benchmarks gpu --output out              # all of it, at most 450 s
    python -m benchmarks gpu --only contract attention # some stages
    python -m benchmarks gpu --second --output out     # after a mend: 150 s, ours also under torch.compile
    python -m benchmarks gpu --rehearse                # without a GPU: the emulated kernels in place of the device
    python -m benchmarks gpu --read out/results.jsonl  # the report of a run
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 450  # of a first run
SECOND = 150  # of a second
_GRACE = 3.0  # seconds between the request to end and the end
_REHEARSED = 2.0  # times the limits: two cores import for longer than a GPU's host


@dataclass(frozen=True)
class Stage:
    """A part of a run: what it is called, the most seconds it may take, and what it finds out."""

    name: str
    seconds: int
    words: str


FIRST = (
    Stage("floors", 20, "versions, libraries that load, a copy, a matrix product"),
    Stage("contract", 45, "what runs, and what is wrong by how much"),
    Stage("attention", 75, "CUDA C++ against flash, cuDNN and efficient attention"),
    Stage("memory", 40, "shares of a copy"),
    Stage("triton", 110, "Triton or CUDA C++ first, by op and shape"),
    Stage("step", 60, "a training step of MAE, and where its time goes"),
    Stage("ncu", 40, "what limits attention, GELU and pooling"),
    Stage("sanitizer", 60, "memory accesses and races of own kernels"),
)
AGAIN = (
    Stage("floors", 15, "versions, libraries that load, a copy, a matrix product"),
    Stage("contract", 30, "what runs, and what is wrong by how much"),
    Stage("attention", 45, "CUDA C++ against flash, cuDNN and efficient attention"),
    Stage("step-compiled", 60, "a training step under torch.compile"),
)
BUILD = Stage("build", 150, "the CUDA library, where the one that came along does not run here")

# What runs in the process of a stage, or of a part of one: a module imports what it needs and no more.
_RUN_BY = {
    "floors": ("floors", "run"),
    "contract": ("contract", "run"),
    "contract-worker": ("contract", "work"),
    "attention": ("attention", "run"),
    "memory": ("memory", "run"),
    "triton": ("triton", "run"),
    "step": ("step", "run"),
    "step-compiled": ("step", "run_compiled"),
    "ncu": ("profilers", "run_ncu"),
    "profiled": ("profilers", "profiled"),
    "sanitizer": ("profilers", "run_sanitizers"),
    "small": ("profilers", "small_cases"),
}
# Says why the CUDA library cannot be measured on this device; nothing where a kernel of it has run.
_UNUSABLE = """
import torch, mimkernels
from mimkernels.ops import _gpus, _native
code = _gpus.code_for(_native.read_build().get("cuda_architectures", ""), torch.cuda.get_device_capability())
try:
    x, ids = torch.ones(1, 2, 8, device="cuda"), torch.zeros(1, 1, dtype=torch.int64, device="cuda")
    if code == "machine code":
        mimkernels.gather_tokens(x, ids, backend="cuda").sum().item()
    else:
        print(f"it has {code or 'nothing'} for this device, not machine code")
except Exception as error:
    print(" ".join(str(error).split()))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu", help="folder of all results")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages: " + ", ".join(s.name for s in FIRST))
    parser.add_argument("--second", action="store_true", help=f"the shorter run after a mend, {SECOND} s")
    parser.add_argument("--rehearse", action="store_true", help="emulated kernels in place of a device, scaled limits")
    parser.add_argument("--read", type=Path, metavar="RESULTS", help="print the report of a results.jsonl")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read is not None:
        from benchmarks.gpu_stages.reader import report
        from benchmarks.gpu_stages.target import read

        print(report(read(options.read)))
        return 0
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    if options.stage:
        return run_stage(options.stage, output, rehearsal=options.rehearse)
    planned = AGAIN if options.second else FIRST
    if options.only:
        unknown = set(options.only) - {stage.name for stage in planned}
        if unknown:
            parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in planned)}")
        planned = tuple(stage for stage in planned if stage.name in options.only)
    if not options.rehearse and not _has_device():
        parser.error("torch sees no GPU here; --rehearse runs without one")
    return run(planned, output, seconds=SECOND if options.second else SECONDS, rehearsal=options.rehearse)


def run(planned: Sequence[Stage], output: Path, *, seconds: float, rehearsal: bool) -> int:
    """Run the stages; 0 where all ended well within their limits."""
    from benchmarks.gpu_stages.reader import report
    from benchmarks.gpu_stages.target import Target, read

    # Whoever ends this run ends its stages, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    target = Target(output, rehearsal)
    if target.results.exists():
        target.results.replace(output / "results.before.jsonl")
    for name in ("log.txt", "rest.tar.gz", "report.md"):
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(target.rest, ignore_errors=True)
    scale = _REHEARSED if rehearsal else 1.0
    deadline = time.monotonic() + seconds * scale
    todo, wrong = list(planned), []
    if not rehearsal and (why := _unusable()):
        print(f"the CUDA library that is here cannot be measured: {why}", flush=True)
        if _has_nvcc():
            todo.insert(0, BUILD)
            deadline += BUILD.seconds
        else:  # of what is here, PTX may run
            target.add("run", BUILD.name, state=f"no nvcc; the library that is here: {why[:400]}", s=0.0)
            wrong.append(BUILD.name)
    for stage in todo:
        limit = min(stage.seconds * scale, deadline - time.monotonic())
        if limit < 1:
            target.add("run", stage.name, state="not begun", s=0.0)
            wrong.append(stage.name)
            continue
        print(f"==> {stage.name} (at most {limit:.0f} s): {stage.words}", flush=True)
        status, taken = _in_group(_command(stage, output, rehearsal), limit, output / "log.txt", rehearsal)
        state = {0: "ended well", None: "out of time"}.get(status, f"ended with {status}")
        if stage is BUILD and (why := _unusable()):
            status, state = status or 1, f"{state}, but no CUDA library runs: {why[:400]}"
        target.add("run", stage.name, state=state, s=round(taken, 1), limit=round(limit, 1))
        print(f"    {state} after {taken:.0f} s", flush=True)
        if status != 0:
            wrong.append(stage.name)
        _archive(target.rest, output / "rest.tar.gz")
        _whole(output / "report.md", report(read(target.results)) + "\n")
    shutil.rmtree(target.rest, ignore_errors=True)
    print((output / "report.md").read_text())
    return 1 if wrong else 0


def run_stage(name: str, output: Path, *, rehearsal: bool) -> int:
    """What runs in a stage's own process."""
    sys.path.insert(0, str(ROOT))  # for the contract's cases
    from benchmarks.gpu_stages.target import Target

    if rehearsal:
        from tests.interpreter import quicken_interpreter

        quicken_interpreter()
    target = Target(output, rehearsal)
    name, _, part = name.partition(":")
    if name == "triton-compile":
        from benchmarks.gpu_stages import triton

        triton.compile_share(target, *map(int, part.split("/")))
        return 0
    module, function = _RUN_BY[name]
    getattr(importlib.import_module(f"benchmarks.gpu_stages.{module}"), function)(target)
    return 0


def _command(stage: Stage, output: Path, rehearsal: bool) -> list[str]:
    if stage is BUILD:
        return [sys.executable, "setup.py", "-q", "build_native", "--inplace", "--only=cuda"]
    command = [sys.executable, "-m", "benchmarks", "gpu", "--stage", stage.name, "--output", str(output)]
    return [*command, "--rehearse"] if rehearsal else command


def _in_group(command: list[str], limit: float, log: Path, rehearsal: bool) -> tuple[int | None, float]:
    """Exit status, None where the limit came first, and the seconds; whatever it started is gone afterwards."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if rehearsal:
        environment["TRITON_INTERPRET"] = "1"
    else:
        environment["MIMKERNELS_CMAKE_ARGS"] = _architecture() + " -DMIMKERNELS_EMULATION=OFF"
    began = time.monotonic()
    with log.open("a") as file:
        file.write(f"==> {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    return status, time.monotonic() - began


def _end(process: subprocess.Popen) -> None:
    """End the whole group, politely first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_GRACE)
            if number == signal.SIGTERM and _group_is_gone(process.pid):
                return


def _group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def _archive(folder: Path, path: Path) -> None:
    """All of a folder in one file, whole at every moment."""
    partial = path.with_name(path.name + ".partial")
    with tarfile.open(partial, "w:gz") as archive:
        if folder.exists():
            archive.add(folder, arcname="rest")
    partial.replace(path)


def _whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _has_device() -> bool:
    import torch

    return torch.cuda.is_available()


def _has_nvcc() -> bool:
    """Whether setup.py finds one."""
    homes = [os.environ.get(name) or "/" for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [Path(home, "bin", "nvcc") for home in (*homes, "/usr/local/cuda")]
    return bool(os.environ.get("CUDACXX") or shutil.which("nvcc")) or any(place.exists() for place in places)


def _unusable() -> str | None:
    """Why the CUDA library that is here cannot be measured on this device; asked in a process of its own."""
    done = subprocess.run([sys.executable, "-c", _UNUSABLE], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    return done.stdout.strip() or None


def _architecture() -> str:
    """Only the device's own architecture, so that a build takes a third of the time."""
    import torch

    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"-DMIMKERNELS_CUDA_ARCHITECTURES={major}{minor}{'a' if major == 9 else ''}-real"
