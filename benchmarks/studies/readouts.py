"""Runs the second stage: fine-tuning and dense readouts of the study's models, one JSON for each piece that is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.studies import cells, plan
from benchmarks.studies.cells import CellError, circumstances, rounded
from benchmarks.studies.plan import DENSE, METRICS, STARTS, Cell, Piece, Share
from mimkernels.data.fashion_mnist import FashionMNISTSource
from mimkernels.engine import files

_ON_CPU = ("--device", "cpu", "--precision", "fp32")
# Settings that say where things lie on the machine.
_PLACES = ("model", "models", "output", "data_root", "val_data", "resume")


def final_weights(cell: Cell, work: Path) -> Path:
    return work / cell.name / "run" / "checkpoints" / "final.pt"


def ensure_run(cell: Cell, work: Path) -> bool:
    """Train a cell as the first stage does, unless `work` holds its finished run; whether it was trained.

    Raises:
        CellError: training failed; names its log.
    """
    if final_weights(cell, work).is_file():
        return False
    folder = work / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    cells.run_command("pretrain", cells.commands(cell, folder, work / "data")["pretrain"], folder)
    return True


def as_recorded(cell: Cell, work: Path, results: Path) -> bool | None:
    """Whether a run's final losses are those of the cell's JSON, within ``TRAINING_TOLERANCE``; None without a JSON."""
    path = results / f"{cell.name}.json"
    if not path.is_file():
        return None
    recorded = json.loads(path.read_text())["training"]
    last = json.loads((work / cell.name / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    losses = [name for name in recorded if name.endswith("loss")]
    return last["step"] == recorded["step"] and all(
        abs(last.get(name, float("inf")) - recorded[name]) <= plan.TRAINING_TOLERANCE * abs(recorded[name])
        for name in losses
    )


def commands(piece: Piece, folder: Path, work: Path) -> dict[str, list[str]]:
    """Arguments of ``mimkernels`` for a piece, by the name of the folder that each writes."""
    if piece.kind != "finetune":
        return {"dense": _dense(piece, folder, work)}
    return {_folder(share): _finetune(piece, share, folder, work) for share in STARTS[piece.of].shares}


def _folder(share: Share) -> str:
    return f"labels-{share.labels.strip('%')}"


def _finetune(piece: Piece, share: Share, folder: Path, work: Path) -> list[str]:
    (cell,) = piece.cells
    start = STARTS[piece.of]
    weights = ["--from-scratch", "--layer-decay", "1"] if start.random else ["--layer-decay", str(plan.LAYER_DECAY)]
    return [
        "finetune", "--model", str(work / cell.name / "run"), *weights, "--head-std", str(start.head_std),
        "--data", plan.DATA, "--data-root", str(work / "data"), "--workers", "0", *_ON_CPU, "--labels", share.labels,
        "--epochs", str(share.epochs), "--batch-size", str(share.batch_size), "--lr", str(plan.LR),
        "--warmup-epochs", str(plan.WARMUP_SHARE * share.epochs), *plan.FINETUNE_OPTIONS, "--seed", str(piece.seed),
        "--val-every", "0", "--save-every", str(share.epochs / 2), "--keep-checkpoints", "1", "--pictures", "0",
        "--output", str(folder / _folder(share)), "--resume", "auto",
    ]  # fmt: skip


def _dense(piece: Piece, folder: Path, work: Path) -> list[str]:
    data, size = DENSE[piece.of], f"img_size={plan.DENSE_SIZE}"
    if piece.kind == "control":
        shape = {"patch_size": plan.PATCH_SIZE, "in_chans": 1, **plan.ENCODER}
        words = [plan.MODEL, "pretrained=false", size, *(f"{name}={value}" for name, value in shape.items())]
        models = [f"{plan.RANDOM}={':'.join(words)}"]
    else:
        models = [f"{cell.method}={work / cell.name / 'run'}:{size}" for cell in piece.cells]
    # Only these images lie in files.
    where = ["--data-root", str(work / "data")] if data.name == plan.DATA else []
    return [
        "dense", *models, "--data", data.name, *where, *_ON_CPU, "--tasks", ",".join(data.tasks),
        "--layers", plan.DENSE_LAYERS, *data.options, "--seed", str(piece.seed), "--pictures", "0",
        "--output", str(folder / "dense"),
    ]  # fmt: skip


def run_piece(piece: Piece, work: Path, results: Path) -> bool:
    """Run the commands of a piece, whose models are trained, and write its result; False if it is there already.

    What an interrupted call left in `work` is taken up where it stands.

    Raises:
        CellError: a model is missing, or a command failed; names its log.
    """
    path = results / f"{piece.name}.json"
    if path.is_file():
        return False
    missing = [cell.name for cell in piece.cells if not final_weights(cell, work).is_file()]
    if missing:
        raise CellError(f"there is no finished run of {', '.join(missing)}")
    folder = work / piece.name
    began_before = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    seconds = {}
    for name, arguments in commands(piece, folder, work).items():
        if not (folder / name / "results.json").is_file():  # fine-tuned before the call was interrupted
            seconds[name] = cells.run_command(name, arguments, folder)
    content = collect(piece, folder, work, results, {} if began_before else seconds)
    results.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(content) + "\n")
    return True


def collect(piece: Piece, folder: Path, work: Path, results: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """The result of a piece whose commands are done, without paths of the machine.

    Raises:
        CellError: the command has not written a metric that the page shows.
    """
    train, test = (FashionMNISTSource(work / "data", part).fingerprint() for part in (True, False))
    return {
        "format": 1,
        "kind": piece.kind,
        "of": piece.of,
        "seed": piece.seed,
        "as_recorded": {cell.method: as_recorded(cell, work, results) for cell in piece.cells},
        "data": {"train": train, "test": test},
        **circumstances(seconds),
        **({"shares": _fine_tuned(piece.of, folder)} if piece.kind == "finetune" else _read(piece, folder / "dense")),
    }


def _fine_tuned(start: str, folder: Path) -> dict[str, Any]:
    """By share of the labels: scores on the test images, and the settings."""
    shares = {}
    for share in STARTS[start].shares:
        run = folder / _folder(share)
        scores = json.loads((run / "results.json").read_text())
        shares[share.labels] = {
            **{name: rounded(scores[name]) for name in ("images", "accuracy", "standard_error", "top5", "loss")},
            "settings": _settings(run),
        }
    return shares


def _read(piece: Piece, run: Path) -> dict[str, Any]:
    """By model: scores of every layer, and the settings."""
    models: dict[str, list[dict[str, Any]]] = {}
    for entry in json.loads((run / "numbers.json").read_text())["results"]:
        for metric in METRICS.values():
            if metric.data == piece.of and metric.key not in entry.get(metric.task, {}):
                names = ", ".join(entry.get(metric.task, {})) or "nothing"
                raise CellError(f"`mimkernels dense` has written no {metric.key} of {metric.task}, but {names}")
        models.setdefault(entry["model"], []).append(
            {name: rounded(value) for name, value in entry.items() if name not in ("model", "losses")}
        )
    return {"models": models, "settings": _settings(run)}


def _settings(run: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((run / "config.json").read_text())
    return {name: value for name, value in config.items() if name not in _PLACES}
