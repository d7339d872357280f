"""The study's second stage: what its pieces run, what they leave, and what the page makes of it."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm")

from benchmarks import study as tool
from benchmarks.studies import cells, claims, page, plan, readout_pictures, readouts
from benchmarks.studies.plan import (
    DENSE,
    METHODS,
    METRICS,
    PLAIN_HEAD,
    SCRATCH,
    SEEDS,
    SHARES,
    STARTS,
    Cell,
    Dense,
    Piece,
    Share,
)
from mimkernels.cli import build_parser, main
from mimkernels.commands.dense.tasks import TASKS
from mimkernels.commands.finetune.config import SMALL, FinetuneConfig, parse_labels

MACHINE = {"device": "a CPU", "cpu_isa": "avx2", "mimkernels": "0", "torch": "0"}
ABOUT = {
    "format": 1,
    "revision": "0123456789abcdef",
    "machine": MACHINE,
    "date": "2026-01-01",
    "seconds": {"all": 36.0},
}
DEPTH = 6


def made_finetune(start, seed, accuracies, **more):
    shares = {share.labels: {"accuracy": value} for share, value in zip(SHARES, accuracies, strict=True)}
    return {**ABOUT, "kind": "finetune", "of": start, "seed": seed, "as_recorded": {}, "shares": shares, **more}


def made_dense(data, seed, values, kind="dense", **more):
    """``values``: by task, by method the numbers of every layer as the command writes them; 0 where there is none."""
    tasks = [metric for metric in METRICS.values() if metric.data == data]
    models = {
        method: [
            {
                "layers": [layer + 1],
                **{
                    m.task: {m.key: values.get(m.task, {}).get(method, [0.0] * DEPTH)[layer], "unmoved_pck_10": 0.125}
                    for m in tasks
                },
            }
            for layer in range(DEPTH)
        ]
        for method in (METHODS if kind == "dense" else (plan.RANDOM,))
    }
    return {**ABOUT, "kind": kind, "of": data, "seed": seed, "as_recorded": {}, "models": models, **more}


def made_cell(method, seed):
    """Enough of a cell's result for a page without pictures of heads."""
    heads = {
        name: {"mean": [[1.0] * 4] * DEPTH}
        for name in ("distance", "entropy", "head_divergence", "cls_cls_attention", "cls_pos_entropy")
    }
    return {
        **ABOUT, "method": method, "budget": "epochs", "seed": seed, "epochs": 13, "seconds": {"pretrain": 36.0},
        "probe": {name: {"accuracy": 0.5} for name in plan.READOUTS},
        "analysis": {"heads": heads, "cka": [[1.0] * 7] * 7, "accuracy_by_depth": [0.5] * 7},
    }  # fmt: skip


def write(folder, results):
    folder.mkdir(exist_ok=True)
    for result in results:
        first = result["method"] + "-epochs" if "method" in result else f"{result['kind']}-{result['of']}"
        (folder / f"{first}-{result['seed']}.json").write_text(json.dumps(result))
    return claims.Study(folder)


def test_every_model_is_fine_tuned_and_read_with_every_seed():
    every = list(plan.pieces())
    assert len(every) == len({piece.name for piece in every}) == len(SEEDS) * (len(STARTS) + 2 * len(DENSE))
    assert not {piece.name for piece in every} & {cell.name for cell in plan.cells()}
    assert [piece.seed for piece in every] == sorted(piece.seed for piece in every)
    assert Piece("finetune", "dino", 2).cells == (Cell("dino", "epochs", 2),)
    assert [cell.method for cell in Piece("dense", "scenes", 1).cells] == list(METHODS)
    assert {metric.data for metric in METRICS.values()} == set(DENSE)
    assert {metric.task for metric in METRICS.values()} == {task for data in DENSE.values() for task in data.tasks}


def test_shares_of_the_labels_are_trained_for_as_many_steps():
    for share in SHARES:
        of_all, _ = parse_labels(share.labels)
        assert share.images == round((1.0 if of_all is None else of_all) * plan.TRAIN_IMAGES) <= SMALL
        assert 450 <= share.epochs * (share.images // share.batch_size) <= 550


def options_of(command):
    return build_parser(command[0]).parse_args(command)


def test_methods_are_fine_tuned_alike(tmp_path):
    def of(start, seed=1):
        ran = readouts.commands(Piece("finetune", start, seed), tmp_path / "piece", tmp_path)
        return {name: vars(options_of(command)) for name, command in ran.items()}

    mae, dino, scratch, plain = of("mae"), of("dino"), of(SCRATCH), of(PLAIN_HEAD["mae"])
    assert list(mae) == ["labels-1", "labels-10", "labels-all"] and list(plain) == ["labels-1", "labels-10"]
    for name in mae:
        assert Path(mae[name]["output"]) == tmp_path / "piece" / name
        assert Path(mae[name]["model"]) == tmp_path / "mae-epochs-1" / "run"
        assert {key for key, value in dino[name].items() if mae[name].get(key) != value} == {"model"}
        other = {key for key, value in scratch[name].items() if mae[name].get(key) != value}
        assert other == {"from_scratch", "layer_decay", "head_std"}
        assert (mae[name]["lr"], mae[name]["head_std"], scratch[name]["head_std"]) == (1e-3, 2e-5, 0.02)
        if name in plain:
            assert {key for key, value in plain[name].items() if mae[name].get(key) != value} == {"head_std"}
            assert plain[name]["head_std"] == 0.02
        fields = {field.name for field in dataclasses.fields(FinetuneConfig)}
        config = FinetuneConfig(**{key: mae[name][key] for key in fields if mae[name].get(key) is not None})
        config.check()
        filled = config.filled(images=50, classes=10, held_out=100, in_memory=True)
        assert (filled["mixup"], filled["cutmix"], filled["erasing"], filled["auto_augment"]) == (0, 0, 0, "none")
        assert (config.seed, filled["epochs"], filled["layer_decay"]) == (1, config.epochs, 0.75)


@pytest.mark.parametrize("data", DENSE.values(), ids=lambda d: d.name)
def test_models_of_a_seed_are_read_in_one_call(data, tmp_path):
    assert set(data.tasks) <= set(TASKS)
    (command,) = readouts.commands(Piece("dense", data.name, 2), tmp_path / "piece", tmp_path).values()
    options = options_of(command)
    assert options.models == [f"{name}={tmp_path / f'{name}-epochs-2' / 'run'}:img_size=56" for name in METHODS]
    assert (options.data, options.tasks, options.layers, options.seed) == (data.name, ",".join(data.tasks), "each", 2)
    assert Path(options.output).parent == tmp_path / "piece"
    (command,) = readouts.commands(Piece("control", data.name, 2), tmp_path / "piece", tmp_path).values()
    control = options_of(command)
    assert {name for name, value in vars(control).items() if vars(options)[name] != value} == {"models"}
    (random,) = control.models
    assert random.startswith("random=vit_tiny_patch16_224:pretrained=false:img_size=56:patch_size=4:in_chans=1:")


def a_run(work, cell, **losses):
    """A finished run as far as the second stage looks at it itself."""
    weights = readouts.final_weights(cell, work)
    weights.parent.mkdir(parents=True)
    weights.touch()
    (work / cell.name / "run" / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + json.dumps(losses) + "\n")


def test_a_run_is_held_against_the_losses_that_were_recorded(tmp_path):
    cell = Cell("mae", "epochs", 0)
    a_run(tmp_path, cell, step=5, loss=2.0, val_loss=1.0, grad_norm=3.0)

    def same(**recorded):
        (tmp_path / f"{cell.name}.json").write_text(json.dumps({"training": recorded}))
        return readouts.as_recorded(cell, tmp_path, tmp_path)

    assert readouts.as_recorded(cell, tmp_path, tmp_path) is None
    assert same(step=5, loss=2.0019, val_loss=1.0, grad_norm=9.0) is True
    assert same(step=5, loss=2.0, val_loss=1.0011) is False
    assert same(step=6, loss=2.0, val_loss=1.0) is False
    assert same(step=5, loss=2.0, val_loss=1.0, reg_loss=0.0) is False  # it has none


class Commands:
    """Stands for the library's commands: notes which ran, leaves what they leave, and fails at one of them if told."""

    def __init__(self, monkeypatch, fail_at=None):
        self.ran, self.fail_at = [], fail_at
        monkeypatch.setattr(cells, "run_command", self.run)
        monkeypatch.setattr(cells, "write_data", lambda folder: None)
        monkeypatch.setattr(
            readouts, "collect", lambda piece, folder, work, results, seconds: {"seconds": seconds, "seed": piece.seed}
        )

    def run(self, name, arguments, folder):
        if f"{folder.name} {name}" == self.fail_at:
            raise cells.CellError(f"`mimkernels {arguments[0]}` ended with status 2")
        self.ran.append(f"{folder.name} {name}")
        output = Path(arguments[arguments.index("--output") + 1])
        (output / "checkpoints").mkdir(parents=True)
        (output / "checkpoints" / "final.pt").touch()
        (output / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
        if arguments[0] == "finetune":
            (output / "results.json").touch()
        return 1.0


def test_a_stage_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    work, results = tmp_path / "work", tmp_path / "results"
    chosen = [Piece("finetune", "mae", 0), Piece("finetune", SCRATCH, 0), Piece("finetune", "dino", 0)]
    broken = Commands(monkeypatch, fail_at="finetune-mae-0 labels-10")
    assert tool.run_readouts(chosen, work, results, jobs=1) == 1
    assert [name for name in broken.ran if "pretrain" in name] == ["dino-epochs-0 pretrain", "mae-epochs-0 pretrain"]
    assert [path.stem for path in sorted(results.iterdir())] == ["finetune-dino-0", "finetune-scratch-0"]
    out, err = capsys.readouterr()
    assert "2 of 3 pieces are done" in out and "finetune-mae-0: `mimkernels finetune` ended with status 2" in err
    whole = Commands(monkeypatch)
    assert tool.run_readouts(chosen, work, results, jobs=2) == 0
    assert whole.ran == ["finetune-mae-0 labels-10", "finetune-mae-0 labels-all"]
    seconds = {path.stem: json.loads(path.read_text())["seconds"] for path in results.iterdir()}
    assert seconds["finetune-mae-0"] == {} and sum(seconds["finetune-dino-0"].values()) == 3


def test_a_piece_waits_for_its_models(tmp_path, monkeypatch, capsys):
    ran = Commands(monkeypatch, fail_at="mae-epochs-0 pretrain")
    results = tmp_path / "results"
    results.mkdir()
    recorded = json.dumps({"training": {"step": 1, "loss": 2.1}})
    (results / "dino-epochs-0.json").write_text(recorded)
    chosen = [Piece("finetune", "dino", 0), Piece("dense", "scenes", 0)]
    assert tool.run_readouts(chosen, tmp_path / "work", results, jobs=1) == 1
    error = capsys.readouterr().err
    assert "dense-scenes-0: there is no finished run of mae-epochs-0" in error and "dense-scenes-0 dense" not in ran.ran
    assert "dino-epochs-0: its last losses are not those of" in error and "supervised-epochs-0: its" not in error
    assert (results / "dino-epochs-0.json").read_text() == recorded
    assert (results / "finetune-dino-0.json").is_file()


def test_pieces_are_listed_with_their_models(tmp_path, monkeypatch, capsys):
    (tmp_path / "finetune-mae-1.json").touch()
    arguments = [
        "study",
        "--readouts",
        "--list",
        "--results",
        str(tmp_path),
        "--seeds",
        "1",
        "--methods",
        "mae",
        "dino",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    assert tool.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["finetune-mae-1", "done"], ["finetune-dino-1"], ["finetune-scratch-1"],
        ["finetune-mae-plain-head-1"], *([f"control-{data}-1"] for data in DENSE),
    ]  # fmt: skip


def small_set(folder):
    """Files as of Fashion-MNIST, 120 and 20 images of noise, as many of each class."""
    folder.mkdir(parents=True)
    for part, count in (("train", 120), ("t10k", 20)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, dtype=">u4").tobytes()
            (folder / f"{part}-{name}-ubyte").write_bytes(header + values.tobytes())


@pytest.mark.slow
def test_a_tiny_stage_from_training_to_results(tmp_path, monkeypatch):
    work, results = tmp_path / "work", tmp_path / "results"
    small_set(work / "data")
    settings = {"EPOCHS": 1, "BATCH_SIZE": 60, "ENCODER": {"embed_dim": 16, "depth": 2, "num_heads": 2}}
    for name, value in settings.items():
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr(Piece, "cells", property(lambda piece: (Cell("mae", "epochs", piece.seed),)))
    for name in ("mae", SCRATCH):
        monkeypatch.setitem(STARTS, name, dataclasses.replace(STARTS[name], shares=(Share("25%", 30, 1, 10),)))
    options = ("--side", "24", "--train-images", "4", "--test-images", "2", "--steps", "2", "--batch-size", "2")
    monkeypatch.setitem(DENSE, "scenes", Dense("scenes", DENSE["scenes"].tasks, options))
    monkeypatch.setattr(cells, "write_data", lambda folder: None)
    ran = []

    def run_here(name, arguments, folder):
        ran.append(f"{folder.name} {name}")
        assert main(arguments) == 0
        return 1.0

    monkeypatch.setattr(cells, "run_command", run_here)
    chosen = [Piece("finetune", "mae", 1), Piece("finetune", SCRATCH, 1), Piece("dense", "scenes", 1)]
    assert tool.run_readouts(chosen, work, results, jobs=1) == 0
    assert ran == [
        "mae-epochs-1 pretrain", "finetune-mae-1 labels-25", "finetune-scratch-1 labels-25", "dense-scenes-1 dense",
    ]  # fmt: skip
    assert tool.run_readouts(chosen, work, results, jobs=1) == 0 and len(ran) == 4
    mae, scratch, dense = (json.loads((results / f"{piece.name}.json").read_text()) for piece in chosen)
    for result, from_scratch, decay in ((mae, False, 0.75), (scratch, True, 1.0)):
        share = result["shares"]["25%"]
        assert (share["settings"]["from_scratch"], share["settings"]["layer_decay"]) == (from_scratch, decay)
        assert share["images"] == 20 and 0 <= share["accuracy"] <= 1
        assert result["as_recorded"] == {"mae": None} and result["seconds"] == {"labels-25": 1.0}
    read = dense["models"]["mae"]
    assert [entry["layers"] for entry in read] == [[1], [2]] and all(entry["grid"] == [14, 14] for entry in read)
    assert "losses" not in read[0] and dense["settings"]["steps"] == 2
    for task in DENSE["scenes"].tasks:
        values = claims.dense_by_layer(METRICS[task])({"layers": read})
        assert len(values) == 2 and values.isfinite().all()
    for path in results.iterdir():
        assert str(tmp_path) not in path.read_text() and "NaN" not in path.read_text(), path.name


def test_a_metric_that_the_command_does_not_write_is_named(tmp_path):
    run = tmp_path / "dense"
    run.mkdir()
    entry = {"model": "mae", "layers": [1], "segmentation": {"iou": [0.5]}}
    (run / "numbers.json").write_text(json.dumps({"results": [entry]}))
    with pytest.raises(cells.CellError, match="has written no miou of segmentation, but iou"):
        readouts._read(Piece("dense", "scenes", 0), run)


def judged(folder, text, results):
    (claim,) = (claim for claim in claims.READOUT_CLAIMS if text in claim.text)
    return claims.judge(claim, write(folder, results), "epochs")


def accuracies(**by_start):
    """Fine-tuned with every share alike, with seeds a tenth of a point apart."""
    return [
        made_finetune(start, seed, [(value + seed / 10) / 100] * 3)
        for start, value in by_start.items()
        for seed in SEEDS
    ]


def test_competitive_is_no_more_than_two_points_behind(tmp_path):
    text = "remain competitive"
    found = judged(tmp_path / "a", text, accuracies(supervised=80, mae=79, simmim=90))
    assert (found.verdict, found.comparisons) == (claims.CONFIRMED, 2)
    assert judged(tmp_path / "b", text, accuracies(supervised=80, mae=77, simmim=76)).verdict == claims.CONTRADICTED
    assert judged(tmp_path / "c", text, accuracies(supervised=80, mae=77, simmim=79)).verdict == claims.UNSEEN
    missing = accuracies(supervised=80, mae=79, simmim=90)[:-1]
    assert judged(tmp_path / "d", text, missing).verdict == claims.OPEN


def test_models_trained_without_labels_are_held_against_scratch(tmp_path):
    others = {"mae": 60, "simmim": 60, "mocov3": 60, "dino": 60, "supervised": 10}
    better = accuracies(**others, **{SCRATCH: 50})
    found = judged(tmp_path / "a", "a strong way to learn from few", better)
    assert (found.verdict, found.comparisons, found.values[SCRATCH]) == (claims.CONFIRMED, 4, [50, 50.1, 50.2])
    assert judged(tmp_path / "b", "a tenth", better).verdict == claims.CONFIRMED
    better = accuracies(**{**others, "dino": 40}, **{SCRATCH: 50})  # three of four are not enough
    assert judged(tmp_path / "c", "a strong way to learn from few", better).verdict == claims.UNSEEN


def read_on(data, task, **by_method):
    """Layers of every seed a thousandth apart."""
    return [
        made_dense(data, seed, {task: {name: [v + seed / 1000 for v in values] for name, values in by_method.items()}})
        for seed in SEEDS
    ]


def test_less_error_of_depth_is_better(tmp_path):
    near, far = [1.0] * 5 + [1.2], [1.0] * 5 + [1.5]  # the last layer counts
    found = judged(tmp_path / "a", "depth", read_on("scenes", "depth", mae=near, simmim=near, supervised=far))
    assert found.verdict == claims.CONFIRMED and found.values["mae"] == pytest.approx([1.2, 1.201, 1.202])
    found = judged(tmp_path / "b", "depth", read_on("scenes", "depth", mae=far, simmim=far, supervised=near))
    assert found.verdict == claims.CONTRADICTED


def test_layers_of_the_middle_are_held_against_the_last(tmp_path):
    middle = [0.9, 0.9, 0.5, 0.3, 0.9, 0.35]  # layers 3 and 4 are 5 points above the last
    results = read_on("scenes", "knn", mae=middle, simmim=middle)
    (claim,) = (claim for claim in claims.READOUT_CLAIMS if "intermediate layers" in claim.text)
    study = write(tmp_path, results)
    assert claim.value(study.runs("mae", "epochs", "scenes")[0]) == pytest.approx(5.0)
    assert study.runs("mae", "flops", "scenes") == study.runs("mae", "flops", claims.FINETUNE) == {}


def rendered(folder, results):
    study = write(folder, results)
    drawn = readout_pictures.draw_readouts(study, folder / "pictures")
    assert drawn == [path.stem for path in sorted((folder / "pictures").glob("*.png"), reverse=True)]
    text = page.text(study, drawn)
    assert "\n\n\n" not in text and all(f"pictures/study/{name}.png" in text for name in drawn)
    return text


def test_a_page_without_readouts_says_so(tmp_path):
    text = rendered(tmp_path, [made_cell("mae", 0)])
    assert "**Not complete:** 42 of 42 pieces of the second stage are still to be run.\n" in text
    assert text.count("No results yet.") == 2 and "Other weights" not in text
    assert f"- Fine-tuning and dense readouts: {len(claims.READOUT_CLAIMS)} not yet known.\n" in text


def test_a_page_with_some_readouts_has_their_numbers(tmp_path):
    segmentation = {"mae": [0.1, 0.2, 0.3, 0.4, 0.3, 0.2]}
    depth = {"mae": [2.0, 1.5, 1.0, 1.25, 1.5, 1.75]}
    compared = {"mae": True, "dino": False}
    text = rendered(tmp_path, [
        made_cell("mae", 0),
        made_finetune("mae", 0, [0.5, 0.6, 0.7]), made_finetune("mae", 1, [0.52, 0.6, 0.7]),
        made_dense("scenes", 0, {"segmentation": segmentation, "depth": depth}, as_recorded=compared),
    ])  # fmt: skip
    assert "39 of 42 pieces of the second stage are still to be run:\nfinetune-supervised-0, finetune-simmim-0" in text
    assert "| | 1% (50) | 10% (500) | all (5,000) |\n" in text
    assert "| MAE | 51.0 ± 1.4 | 60.0 ± 0.0 | 70.0 ± 0.0 |\n" in text and "| From scratch |  |  |  |\n" in text
    assert "| | segmentation, mIoU (%) | nearest patches, mIoU (%) | depth, RMSE (m) |\n" in text
    assert "| MAE | 20.0 | 0.0 | 1.750 |\n" in text and "| MAE | 4: 40.0 | 1: 0.0 | 3: 1.000 |\n" in text
    assert "had runs of dino-epochs-0 whose last losses differ by more than\n0.1 % from" in text
    assert "MAE&nbsp;51.0&nbsp;±&nbsp;1.4" in text
    assert "3 of 42 pieces are there; those that ran\nuninterrupted (3) took 0.0 processor hours." in text


def test_a_page_with_all_readouts_knows_every_sentence(tmp_path):
    results = [made_cell("mae", 0)]
    for piece in plan.pieces():
        value = (list(STARTS).index(piece.of) + piece.seed / 100) / 10 if piece.kind == "finetune" else 0.0
        if piece.kind == "finetune":
            results.append(made_finetune(piece.of, piece.seed, [value] * 3))
        else:
            rising = {name: [n + piece.seed / 100] * DEPTH for n, name in enumerate((*METHODS, plan.RANDOM))}
            tasks = DENSE[piece.of].tasks
            results.append(made_dense(piece.of, piece.seed, dict.fromkeys(tasks, rising), piece.kind))
    text = rendered(tmp_path, results)
    assert "pieces of the second stage are still to be run" not in text and "No results yet." not in text
    (line,) = (line for line in text.splitlines() if line.startswith("- Fine-tuning and dense readouts"))
    assert "not yet known" not in line and "42 of 42 pieces are there" in text
    assert "keypoints, PCK@0.1 (%) | correspondence, PCK@0.1 (%) |\n" in text
    assert " If nothing had moved, PCK@0.1 of correspondence would be 12.5 ± 0.0 %.\n" in text


def test_starts_are_drawn_over_the_labels_and_methods_over_layers(tmp_path):
    study = write(tmp_path, [
        made_finetune("mae", 0, [0.5, 0.6, 0.7]), made_finetune("mae", 1, [0.7, 0.6, 0.7]),
        made_finetune(SCRATCH, 0, [0.1, 0.2, 0.3]),
        *read_on("scenes", "depth", mae=[2.0, 1.5, 1.0, 1.25, 1.5, 1.75]),
    ])  # fmt: skip
    (panel,) = readout_pictures.over_labels(study).axes
    assert [line.get_ydata().tolist() for line in panel.lines[:2]] == [
        pytest.approx([60.0, 60.0, 70.0]), pytest.approx([10.0, 20.0, 30.0]),
    ]  # fmt: skip
    assert [len(marks.get_offsets()) for marks in panel.collections] == [6, 3]
    panels = {axes.get_title("left"): axes for axes in readout_pictures.over_layers(study).axes}
    assert list(panels) == ["segmentation, mIoU (%)", "nearest patches, mIoU (%)", "depth, RMSE (m)"]
    means = [line.get_ydata() for line in panels["depth, RMSE (m)"].lines if line.get_marker() == "o"]
    assert torch.as_tensor(means[1]).tolist() == pytest.approx([2.001, 1.501, 1.001, 1.251, 1.501, 1.751])


def test_committed_pieces_are_whole():
    committed = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "study"
    for piece in plan.pieces():
        path = committed / f"{piece.name}.json"
        if path.is_file():
            result = json.loads(path.read_text())
            assert (result["kind"], result["of"], result["seed"]) == (piece.kind, piece.of, piece.seed), path.stem
            assert set(result["as_recorded"]) == {cell.method for cell in piece.cells}, path.stem
            assert "+changes" not in result["revision"], path.stem
            if piece.kind == "finetune":
                assert list(result["shares"]) == [share.labels for share in STARTS[piece.of].shares], path.stem
                assert all(0 < share["accuracy"] < 1 for share in result["shares"].values()), path.stem
    study = claims.Study(committed)
    for claim in claims.READOUT_CLAIMS:
        compared = (*claim.of, *(claim.against if isinstance(claim.against, tuple) else ()))
        for method in compared if claim.source == claims.FINETUNE else METHODS:
            assert all(math.isfinite(claim.value(r)) for r in study.runs(method, "epochs", claim.source).values())
