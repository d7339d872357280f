"""``mimkernels info``: what this installation can do here; for what is missing, the reason and the remedy."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from mimkernels._version import __version__
from mimkernels.data.masks import native as masks
from mimkernels.engine.memory import freed_memory
from mimkernels.ops import _gpus, _native, _registry

# The extra `train`.
_TRAIN = (
    "timm", "torchvision", "accelerate", "tensorboard", "rich", "jinja2", "matplotlib", "scikit-learn", "scipy",
    "pillow",
)  # fmt: skip


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``info`` to the command line."""
    parser = subparsers.add_parser("info", help="versions, devices, libraries, backends, and what is missing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def collect() -> dict:
    """Versions, devices, memory, native libraries and backends, as plain data."""
    return {
        "versions": _versions(),
        "devices": _devices(),
        "memory": dict(zip(("freed_memory", "detail"), freed_memory(), strict=True)),
        "libraries": [_library(state) for state in (*_native.libraries(), masks.state())],
        "backends": [_backend(backend) for backend in _registry.BACKENDS.values()],
        "ops": _ops(),
    }


def _ops() -> dict[str, list[str]]:
    return {name: [impl.backend for impl in spec.impls] for name, spec in _registry.SPECS.items()}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "mimkernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("numpy", "triton", *_TRAIN):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _devices() -> list[dict]:
    devices = [
        {
            "name": "cpu",
            "model": _cpu_model(),
            "threads": torch.get_num_threads(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
        }
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": f"cuda:{index}",
                "model": facts.name,
                "capability": f"{facts.major}.{facts.minor}",
                "memory_gib": round(facts.total_memory / 2**30, 1),
            }
        )
    return devices


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _library(state: _native.NativeLibrary) -> dict:
    build = state.build
    built_with = None
    if state.path.exists() and build:
        built_with = {key: build.get(key) for key in ("torch", "compiler", "flags")}
        if state.name == "cpu":
            built_with["instruction_sets"] = list(build.get("isas", {}))
        elif state.name == "cuda":
            built_with["nvcc"] = build.get("nvcc")
            built_with["architectures"] = build.get("cuda_architectures", "").split()
    return {
        "name": state.name,
        "loaded": state.loaded,
        "path": str(state.path),
        "instruction_set": state.isa,
        "built_with": built_with,
        "reason": state.reason,
        "remedy": state.remedy,
    }


def _backend(backend: _registry.Backend) -> dict:
    reason, remedy = _registry.backend_state(backend.name), None
    if reason and backend.library:
        remedy = _native.library(backend.library).remedy
    elif reason:
        remedy = f"pip install {backend.name}"
    elif backend.devices == ("cuda",) and not torch.cuda.is_available():
        reason = "no CUDA device is visible to torch"
        remedy = "run on a machine with an NVIDIA GPU and its driver"
        if backend.name == "triton":
            remedy += " (for tests, TRITON_INTERPRET=1 runs it on CPU tensors when it is named)"
    elif backend.devices == ("cuda",):
        refusals = [_gpus.refusal(backend.name, index, named=False) for index in range(torch.cuda.device_count())]
        if all(refusals):
            reason, remedy = refusals[0], "what it names, or another GPU; without it the ops run on other backends"
    return {
        "name": backend.name,
        "available": reason is None,
        "devices": ["any"] if backend.devices is None else list(backend.devices or backend.testing_devices),
        "ops": [name for name, backends in _ops().items() if backend.name in backends],
        "reason": reason,
        "remedy": remedy,
    }


def _tables(facts: dict) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Titled tables of (name, state, detail)."""
    versions = [(name, version or "-", "") for name, version in facts["versions"].items()]
    devices = []
    for device in facts["devices"]:
        if device["name"] == "cpu":
            detail = f"{device['threads']} threads, {device['instruction_set']}"
        else:
            detail = f"compute capability {device['capability']}, {device['memory_gib']} GiB"
        devices.append((device["name"], device["model"], detail))
    libraries = []
    for library in facts["libraries"]:
        with_ = library["built_with"] or {}
        details = []
        if library["instruction_set"]:
            choice = ", ".join(with_.get("instruction_sets", []))
            details.append(f"runs {library['instruction_set']} of {choice}")
        if with_.get("architectures"):
            details.append(f"for {', '.join(with_['architectures'])}, nvcc {with_['nvcc']}")
        if with_:
            details.append(f"built with {with_['compiler']}, torch {with_['torch']}")
        libraries.append((library["name"], "loaded" if library["loaded"] else "missing", "; ".join(details)))
    backends = []
    everything = len(facts["ops"])
    for backend in facts["backends"]:
        ops = "all ops" if len(backend["ops"]) == everything else ", ".join(backend["ops"]) or "no op yet"
        state = "available" if backend["available"] else "unavailable"
        backends.append((backend["name"], state, f"{ops}; on {', '.join(backend['devices'])}"))
    memory = [("freed memory", facts["memory"]["freed_memory"], facts["memory"]["detail"])]
    titles = ("Versions", "Devices", "Memory", "Native libraries", "Backends")
    return list(zip(titles, (versions, devices, memory, libraries, backends), strict=True))


def _missing(facts: dict) -> list[tuple[str, str, str]]:
    """(what, reason, remedy) of everything that is not there; a backend is not repeated for its library."""
    libraries: dict[tuple[str, str], list[str]] = {}  # by reason and remedy, which several may share
    for library in facts["libraries"]:
        if not library["loaded"]:
            libraries.setdefault((library["reason"], library["remedy"] or ""), []).append(library["name"])
    missing = [
        (f"{', '.join(names)} {'library' if len(names) == 1 else 'libraries'}", reason, remedy)
        for (reason, remedy), names in libraries.items()
    ]
    known = {reason for _, reason, _ in missing}
    for backend in facts["backends"]:
        if not backend["available"] and backend["reason"] not in known:
            missing.append((f"{backend['name']} backend", backend["reason"], backend["remedy"] or ""))
    absent = [name for name in _TRAIN if facts["versions"][name] is None]
    if absent:
        missing.append((", ".join(absent), "not installed", "pip install 'mimkernels[train]'"))
    return missing


def _print_plain(facts: dict) -> None:
    for title, rows in _tables(facts):
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        print(title)
        for name, state, detail in rows:
            print(f"  {name:<{widths[0]}}  {state:<{widths[1]}}  {detail}".rstrip())
        print()
    for what, reason, remedy in _missing(facts):
        print(f"{what}: {reason}\n  remedy: {remedy}")


def _print_rich(facts: dict) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colors = {
        "loaded": "green",
        "available": "green",
        "kept": "green",
        "missing": "yellow",
        "unavailable": "yellow",
        "-": "dim",
    }
    console = Console(highlight=False)
    for title, rows in _tables(facts):
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        for name, state, detail in rows:
            color = colors.get(state, "default")
            table.add_row(f"  {escape(name)}", f"[{color}]{escape(state)}[/]", escape(detail))
        console.print(table)
        console.print()
    for what, reason, remedy in _missing(facts):
        console.print(f"[yellow]{escape(what)}[/]: {escape(reason)}")
        console.print(f"  remedy: {escape(remedy)}")


def _run(arguments: argparse.Namespace) -> int:
    facts = collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    try:
        if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            raise ImportError
        import rich  # noqa: F401
    except ImportError:
        _print_plain(facts)
    else:
        _print_rich(facts)
    return 0
