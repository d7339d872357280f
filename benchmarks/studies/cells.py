"""Runs cells of the study by the library's commands, one JSON for each when it is done."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies import plan
from benchmarks.studies.plan import METHODS, Cell
from mimkernels.data.fashion_mnist import FashionMNISTSource
from mimkernels.data.pixels import drawn
from mimkernels.engine import files

ROOT = Path(__file__).resolve().parents[2]
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_TAIL = 8  # lines of a log that are shown where a command failed


class CellError(Exception):
    """A command of a cell failed."""


def write_data(folder: Path) -> None:
    """Write the subset of Fashion-MNIST as its four idx files, unless the folder holds them."""
    for train, part, count in ((True, "train", plan.TRAIN_IMAGES), (False, "t10k", plan.TEST_IMAGES)):
        names = (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte")
        if all((folder / f"{name}.gz").is_file() for name in names):
            continue
        source = FashionMNISTSource(folder / "whole", train)
        chosen = drawn(len(source), count, plan.DATA_SEED)
        images = np.stack([source.read(index)[0].numpy() for index in chosen])
        labels = np.array(source.targets()[0], dtype=np.uint8)[chosen]
        for name, values in zip(names, (images, labels), strict=True):
            header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, dtype=">u4").tobytes()
            with files.atomic_file(folder / f"{name}.gz") as file:
                file.write(gzip.compress(header + values.tobytes(), mtime=0))


def commands(cell: Cell, folder: Path, data: Path) -> dict[str, list[str]]:
    """Arguments of ``mimkernels`` for a cell, in the order in which they run."""
    here = ["--data", plan.DATA, "--data-root", str(data), "--workers", "0", "--device", "cpu", "--precision", "fp32"]
    run = str(folder / "run")
    return {
        "pretrain": [
            "pretrain", "--method", cell.method, "--model", plan.MODEL, "--in-chans", "1",
            "--img-size", str(plan.IMG_SIZE), "--patch-size", str(plan.PATCH_SIZE),
            "--model-kwargs", *(f"{name}={value}" for name, value in plan.ENCODER.items()), *here,
            *METHODS[cell.method].options,
            "--epochs", str(cell.epochs), "--warmup-epochs", str(plan.WARMUP_SHARE * cell.epochs),
            "--batch-size", str(plan.BATCH_SIZE), "--lr", str(plan.LR), "--seed", str(cell.seed),
            "--val-every", "0", "--save-every", str(cell.epochs / 4), "--keep-checkpoints", "1", "--pictures", "0",
            "--output", run, "--resume", "auto",
        ],
        "probe": [
            "probe", "--model", run, *here, "--pooling", ",".join(plan.READOUTS), "--epochs", str(plan.PROBE_EPOCHS),
            "--batch-size", str(plan.PROBE_BATCH_SIZE), "--seed", str(cell.seed), "--pictures", "0",
            "--output", str(folder / "probe"),
        ],
        "analyze": [
            "analyze", f"{cell.method}={run}", *here, "--images", str(plan.ANALYZED_IMAGES), "--viewer-images", "0",
            "--output", str(folder / "analysis"),
        ],
    }  # fmt: skip


def run_cell(cell: Cell, work: Path, results: Path) -> bool:
    """Pre-train, probe and analyse a cell, and write its result; False if it is there already.

    What an interrupted call left in `work` is taken up where it stands.

    Raises:
        CellError: a command failed; names its log.
    """
    path = results / f"{cell.name}.json"
    if path.is_file():
        return False
    folder = work / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    began_before = (folder / "run" / "metrics.jsonl").exists()
    seconds = {
        name: run_command(name, arguments, folder) for name, arguments in commands(cell, folder, work / "data").items()
    }
    content = collect(cell, folder, work / "data", {} if began_before else seconds)
    results.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(content) + "\n")
    return True


def run_command(name: str, arguments: Sequence[str], folder: Path) -> float:
    """Run a command on one thread; the processor time that it took.

    Args:
        name: of its log in `folder`.

    Raises:
        CellError: it failed.
    """
    log = folder / f"{name}.log"
    command = [sys.executable, "-m", "mimkernels", *arguments]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("a") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **_ONE_THREAD, "PYTHONPATH": path}
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])
        raise CellError(f"`mimkernels {arguments[0]}` ended with status {child.returncode}; {log} ends with:\n{last}")
    return usage.ru_utime + usage.ru_stime


def collect(cell: Cell, folder: Path, data: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """The result of a cell whose commands are done, without paths of the machine."""
    config = json.loads((folder / "run" / "config.json").read_text())
    entries = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    probe = json.loads((folder / "probe" / "results.json").read_text())
    analysis = json.loads((folder / "analysis" / "numbers.json").read_text())
    run = analysis["models"][0]["runs"][0]
    train, test = (FashionMNISTSource(data, part).fingerprint() for part in (True, False))
    return {
        "format": 1,
        "method": cell.method,
        "budget": cell.budget,
        "seed": cell.seed,
        "epochs": cell.epochs,
        "encoder_flops_per_image": METHODS[cell.method].flops,
        "data": {"train": train, "test": test, "analyzed": run["facts"]["images"]},
        "settings": {name: value for name, value in config.items() if name not in ("output", "data_root", "resume")},
        **circumstances(seconds),
        "training": entries[-1],
        "probe": {entry["label"]: {"accuracy": entry["accuracy"], "knn": entry["knn"],
                                   "parameters": entry["pooling_parameters"]} for entry in probe["results"]},
        "analysis": {
            "facts": {name: value for name, value in run["facts"].items() if name != "encoder"},
            **{part: quantities(run[part]) for part in ("heads", "states", "outputs")},
            "accuracy_by_depth": run["accuracy"],
            "cka": rounded(analysis["cka"][cell.method]),
        },
    }  # fmt: skip


def circumstances(seconds: dict[str, float]) -> dict[str, Any]:
    """By what, where and when a result was made, and the processor time of each command."""
    from mimkernels.commands.bench.results import machine

    return {
        "revision": revision(),
        "machine": {**machine("cpu"), "threads": 1},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def quantities(statistics: dict[str, Any]) -> dict[str, dict[str, list[list[float | None]]]]:
    """By quantity: ``mean`` and ``std`` over images, ``[layers][heads]``, without the sums that they come from."""
    layers = [statistics["layers"][number] for number in sorted(statistics["layers"], key=int)]
    names = [name for name, value in layers[0].items() if isinstance(value, dict)]
    return {
        name: {moment: [rounded(layer[name][moment]) for layer in layers] for moment in ("mean", "std")}
        for name in names
    }


def rounded(value: Any) -> Any:
    """Six digits, which is more than seeds have in common; None for NaN, which JSON has not."""
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    return value


def revision() -> str:
    """The commit of this checkout, with a mark if files of it were changed."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], check=True, capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changed else "")
