"""Results of a run: one JSON file for each group and dtype, written anew after every case.

A file is a *report*: ``machine``, ``complete`` and ``results``, one *record* (``Timing.record``) for each case.
``complete`` is false until the last of the wanted cases is in it: so a run that was stopped keeps the cases that it
measured, and whoever reads them knows. Reports without the word are complete.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import mimkernels
from mimkernels.commands.bench.timing import Timing
from mimkernels.engine.files import write_text
from mimkernels.ops import _native

_ROOT = Path(__file__).parents[3]
#: Where results are written: in a checkout its own folder, elsewhere one in the current folder.
RESULTS = (_ROOT if (_ROOT / "CMakeLists.txt").is_file() else Path()) / "benchmarks" / "results"


def output_folder(text: str) -> Path:
    """The folder that ``--output`` names, for argparse."""
    if not text:  # an empty variable of a shell; a path would take it for the current folder
        raise argparse.ArgumentTypeError("it is empty: name a folder, . for the current one")
    return Path(text)


def machine(device: str) -> dict:
    """What the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "cpu_isa": _native.library("cpu").isa if device == "cpu" else None,
        "torch": torch.__version__,
        "mimkernels": mimkernels.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def folder_of(about: dict) -> str:
    """Name of the folder for the results of a machine."""
    label = "".join(c if c.isalnum() else "-" for c in about["device"].lower()).strip("-")
    return f"{label}-{about['threads']}-threads-{about['cpu_isa']}" if about["threads"] else label


def save(timings: list[Timing], about: dict, name: str, folder: Path | None = None, *, complete: bool) -> Path:
    """Write a report, in place of an earlier one of this name, and return its path.

    A crash leaves the earlier file or the new one, never half of one.

    Args:
        about: ``machine(device)``.
        name: group and dtype, such as ``"gathering-float32"``.
        folder: where to; by default ``RESULTS / folder_of(about)``.
    """
    path = (folder or RESULTS / folder_of(about)) / f"{name}.json"
    report = {"machine": about, "complete": complete, "results": [timing.record() for timing in timings]}
    write_text(path, json.dumps(report, indent=1) + "\n")
    return path


def read_report(path: Path) -> dict:
    """Read one report.

    Raises:
        ValueError: the file does not exist or holds none.
    """
    report = _content(path)
    _check(path, report)
    return report


def read_reports(folder: Path) -> dict[str, dict]:
    """The reports in a folder, by group and dtype; JSON objects without "results" are left out.

    Raises:
        ValueError: a file holds no JSON, or a report that is malformed.
    """
    reports = {}
    for path in sorted(folder.glob("*.json")):
        content = _content(path)
        if isinstance(content, dict) and "results" not in content:
            continue
        _check(path, content)
        reports[path.stem] = content
    return reports


def _content(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} holds no results of a run: {error}") from error


def _check(path: Path, report: Any) -> None:
    """Refuse what ``save`` has not written, by what is wrong with it."""
    if not isinstance(report, dict):
        raise ValueError(f"{str(path)!r} holds no results of a run: expected an object, found {_kind(report)}")
    kinds: dict[str, type] = {"machine": dict, "results": list}
    for key, kind in kinds.items():
        if not isinstance(report.get(key), kind):
            raise ValueError(f"{str(path)!r} holds no results of a run: {key} is {_kind(report.get(key))}")
    fields: dict[str, type] = {"name": str, "shape": str, "dtype": str, "median_us": dict}
    for number, record in enumerate(report["results"]):
        wrong = "" if isinstance(record, dict) else f"is {_kind(record)}"
        for key, kind in fields.items():
            if not wrong and not isinstance(record.get(key), kind):
                wrong = f"has {key} {_kind(record.get(key))}"
        if wrong:
            raise ValueError(f"{str(path)!r} holds no results of a run: result {number} {wrong}")


def _kind(value: object) -> str:
    names = {type(None): "missing", dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return names.get(type(value), "a number")


def incomplete(reports: Mapping[str, dict]) -> str:
    """Which of the named reports are of a run that was stopped, in words; empty where all are complete."""
    stopped = {name: len(report["results"]) for name, report in reports.items() if not report.get("complete", True)}
    if not stopped:
        return ""
    return f"incomplete, the run was stopped: {', '.join(f'{name} ({count} cases)' for name, count in stopped.items())}"
