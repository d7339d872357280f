"""`mimkernels finetune` on embedded digits: what is chosen, trained, continued, reported and saved."""

import io
import json
import os
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from mimkernels.cli import main
from mimkernels.commands.finetune.config import FinetuneConfig
from mimkernels.commands.finetune.presets import PRESETS
from mimkernels.commands.finetune.report import confusion_map
from mimkernels.commands.finetune.run import FinetuneRun, finetune
from mimkernels.commands.finetune.source import choose_labels
from mimkernels.commands.pretrain.run import pretrain
from mimkernels.data.labelled import LabelledImages
from mimkernels.data.sources import DigitsSource
from mimkernels.engine.checkpoint import load
from mimkernels.engine.encoder import load_encoder
from mimkernels.engine.model_names import ModelChoice
from mimkernels.engine.training.history import read_entries
from mimkernels.engine.training.loop import Trainer
from mimkernels.nn.encoder import create_encoder
from tests.data.folders import fill

FINETUNE = {
    "data": "digits", "labels": "10%", "batch_size": 50, "epochs": 2, "lr": 5e-3, "workers": 0, "device": "cpu",
    "precision": "fp32", "log_every": 1, "pictures": 3, "save_every": 0.4,
}  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tiny_settings, tmp_path_factory):
    """A run of `mimkernels pretrain` of two blocks, one step long."""
    from mimkernels.commands.pretrain.config import PretrainConfig

    folder = tmp_path_factory.mktemp("pretrained") / "run"
    kwargs = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    settings = {**tiny_settings, "batch_size": 1500, "model_kwargs": kwargs, "pictures": 0, "warmup_epochs": 0.0}
    pretrain(PretrainConfig(**settings, output=str(folder)), stream=io.StringIO())
    return folder


@pytest.fixture
def settings(pretrained, tmp_path):
    def make(**changes) -> FinetuneConfig:
        return FinetuneConfig(**{**FINETUNE, "model": str(pretrained), "output": str(tmp_path / "run"), **changes})

    return make


def run(config, **options):
    return finetune(config, stream=io.StringIO(), **options)


def test_a_run_learns_and_is_reported_and_loaded_by_timm(settings, tmp_path, pretrained):
    result = run(settings(labels="50%", epochs=4, lr=2e-2, drop_path=0.0, layer_decay=1.0, test_crop=0.9))
    assert (result.step, result.stopped_by) == (60, 0)
    content = result.content
    assert content.tested.accuracy > 0.3 and len(content.tested) == 297
    entries = read_entries(tmp_path / "run" / "metrics.jsonl")
    assert entries[-1]["loss"] < entries[0]["loss"] and entries[-1]["val_accuracy"] > entries[14]["val_accuracy"]
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert saved["accuracy"] == content.tested.accuracy and np.sum(saved["confusion"]) == 297
    assert entries[-1]["val_accuracy"] == pytest.approx(saved["accuracy"], abs=1e-6)
    page = (tmp_path / "run" / "report.html").read_text()
    for text in ("The worst mistakes", "The heads before and after", "What is confused with what", "timm.create_model"):
        assert text in page
    # The weights, by the line that the page shows.
    arguments = dict(content.arguments)
    model = timm.create_model(
        arguments.pop("model_name"), **arguments, checkpoint_path=tmp_path / "run" / "final.pth"
    ).eval()
    run_ = load(tmp_path / "run" / "checkpoints" / "final.pt")
    assert torch.equal(model.head.weight, run_["model"]["head.weight"])
    best = torch.load(tmp_path / "run" / "best.pth", weights_only=True)
    assert best["model"].keys() == model.state_dict().keys() and best["timm"] == content.arguments
    # What analyze and probe make of it, from the folder and from the file.
    from mimkernels.engine.model_names import ModelChoice

    for place in ("run", "run/final.pth"):
        encoder = load_encoder(ModelChoice("x", str(tmp_path / place)))
        assert torch.equal(encoder.model.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
        assert torch.equal(encoder.model.fc_norm.weight, model.fc_norm.weight)


def test_every_layer_learns_at_its_rate(settings, monkeypatch):
    rates = []
    step = Trainer._train_step

    def seen(self, batches):
        step(self, batches)
        rates.append({group["lr_scale"]: group["lr"] for group in self.optimizer.param_groups})

    monkeypatch.setattr(Trainer, "_train_step", seen)
    run(settings(layer_decay=0.5, epochs=1, warmup_epochs=0.0, freeze=1))
    assert all(rate == pytest.approx(share * each[1.0]) for each in rates for share, rate in each.items())
    assert set(rates[0]) == {0.5, 1.0}  # layer 2 and the classifier; those below are frozen


def test_frozen_layers_stay_and_others_move(settings, tmp_path, pretrained):
    run(settings(freeze=1, epochs=1))
    before, after = (load(folder / "checkpoints" / "final.pt")["model"] for folder in (pretrained, tmp_path / "run"))
    same = {
        name
        for name in before
        if name.startswith("encoder.") and torch.equal(before[name], after.get(name, before[name]))
    }
    assert {"encoder.cls_token", "encoder.patch_embed.proj.weight", "encoder.blocks.0.mlp.fc1.weight"} <= same
    assert "encoder.blocks.1.mlp.fc1.weight" not in same


STRONG = {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.5, "auto_augment": "rand-m9-mstd0.5-inc1", "ema": 0.9}


@pytest.mark.parametrize("by", ["command", "function"])
def test_a_run_goes_on_bit_for_bit(settings, tmp_path, monkeypatch, by):
    whole = settings(**STRONG, output=str(tmp_path / "whole"))
    run(whole)
    part = settings(**STRONG)
    step = Trainer._train_step

    def stop(self, batches):
        if self.step == 4:
            raise KeyboardInterrupt
        step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(part)
    # Nothing but the folder is needed: what it started from may be gone.
    monkeypatch.setattr("mimkernels.commands.finetune.run.load_source", lambda config: pytest.fail("was read again"))
    if by == "command":
        assert main(["finetune", "--output", part.output, "--resume", "--model", part.model]) == 0
    else:
        run(part, resume="auto")
    one, other = (load(tmp_path / name / "checkpoints" / "final.pt")["model"] for name in ("whole", "run"))
    assert one.keys() == other.keys() and any(name.startswith("average.") for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("final.pth", "best.pth"):
        one, other = (torch.load(tmp_path / run / name, weights_only=True)["model"] for run in ("whole", "run"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    losses = [[entry["loss"] for entry in read_entries(tmp_path / run / "metrics.jsonl")] for run in ("whole", "run")]
    assert losses[0] == losses[1]


def test_stochastic_depth_of_a_run_that_goes_on_is_the_one_given(settings, tmp_path, monkeypatch, capsys):
    run(settings(epochs=1, drop_path=0.1, pictures=0))
    seen = []
    step = Trainer._train_step

    def watched(self, batches):
        seen.append(self._plain.encoder.blocks[-1].drop_path2.drop_prob)
        step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", watched)
    words = ["finetune", "--output", str(tmp_path / "run"), "--resume", "--epochs", "2", "--drop-path", "0.5"]
    assert main(words) == 0
    assert set(seen) == {0.5} and "drop_path: 0.1 -> 0.5" in capsys.readouterr().out


def test_the_range_of_pixels_of_a_run_that_goes_on_is_the_one_given(settings, tmp_path, capsys):
    run(settings(epochs=1, pictures=0, pixel_range="0,4095"))
    words = ["finetune", "--output", str(tmp_path / "run"), "--resume", "--epochs"]
    for epochs, given, taken in (("2", [], "0,4095"), ("3", ["--pixel-range", "0,100"], "0,100")):
        assert main([*words, epochs, *given]) == 0
        assert json.loads((tmp_path / "run" / "config.json").read_text())["pixel_range"] == taken
    assert "pixel_range: '0,4095' -> '0,100'" in capsys.readouterr().out


def test_the_folder_of_a_pretraining_is_not_taken(settings, pretrained):
    before = {path: path.read_bytes() for path in pretrained.rglob("*") if path.is_file()}
    for overwrite in (False, True):
        with pytest.raises(
            ValueError, match="holds what another command, .* its config.json has blur_prob, bottleneck_dim"
        ):
            run(settings(output=str(pretrained)), overwrite=overwrite)
    assert before == {path: path.read_bytes() for path in pretrained.rglob("*") if path.is_file()}


def test_images_that_only_the_last_test_reads_and_cannot_are_told_of(settings, tmp_path):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            fill(tmp_path / "data" / part / name, 4)
    (tmp_path / "data" / "val" / "cat" / "1.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"1 of 8 test images cannot be read, such as .*cat/1.png: .*; they are left"):
        result = run(settings(data=str(tmp_path / "data"), labels="all", batch_size=4, epochs=1, val_images=2))
    assert len(result.content.tested) == 7


def test_other_architectures_and_commands_are_not_continued(settings, pretrained, tmp_path, capsys):
    run(settings(epochs=1))
    with pytest.raises(ValueError, match="already holds a run"):
        run(settings(epochs=1))
    for change in ({"readout": "cls"}, {"freeze": 1}, {"ema": 0.5}):
        words = [word for name, value in change.items() for word in (f"--{name}", str(value))]
        assert main(["finetune", "--output", str(tmp_path / "run"), "--resume", *words]) == 2
        assert "another architecture" in capsys.readouterr().err
    for words, change in (
        (["--model", "elsewhere"], "model: "),
        (["--from-scratch"], "from_scratch: False -> True"),
        (["--head-std", "0.5", "--epochs", "2"], "head_std: 0.02 -> 0.5"),
    ):
        assert main(["finetune", "--output", str(tmp_path / "run"), "--resume", *words]) == 2
        assert change in capsys.readouterr().err  # the report would name it as what the weights began with
    assert main(["finetune", "--output", str(tmp_path / "x"), "--resume", str(pretrained)]) == 2
    assert "is of method 'mae', which this command does not continue" in capsys.readouterr().err
    assert main(["pretrain", "--output", str(tmp_path / "x"), "--resume", str(tmp_path / "run")]) == 2
    assert "is of method 'finetune', which this command does not continue" in capsys.readouterr().err


def test_a_run_that_replaces_another_leaves_none_of_its_weights_and_results(settings, tmp_path, monkeypatch):
    run(settings(epochs=1))
    results = [tmp_path / "run" / name for name in ("final.pth", "best.pth", "report.html", "results.json")]
    assert all(path.is_file() for path in results)

    def crash(self, batches):
        raise RuntimeError

    monkeypatch.setattr(Trainer, "_train_step", crash)
    with pytest.raises(RuntimeError):
        run(settings(epochs=1, seed=1), overwrite=True)
    assert not any(path.exists() for path in results)
    with pytest.raises(ValueError, match="holds no run"):
        load_encoder(ModelChoice("run", str(tmp_path / "run")))


def test_a_folder_without_a_run_keeps_what_it_has(settings, tmp_path):
    (tmp_path / "run").mkdir()
    own = {name: tmp_path / "run" / name for name in ("final.pth", "results.json")}
    for path in own.values():
        path.write_text("mine")
    started = FinetuneRun(settings(epochs=1), stream=io.StringIO())
    with started._held:
        started._open_folder(0).close()
    assert all(path.read_text() == "mine" for path in own.values())


def test_images_none_of_which_can_be_read_are_refused_with_the_first(settings, tmp_path):
    for number in range(8):
        place = tmp_path / "data" / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^none of the 2 images of .*; the first, .*png: not an image of a known"):
        run(settings(data=str(tmp_path / "data"), labels="all", batch_size=2))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_layers_and_writes_nothing(settings, tmp_path, capsys):
    config = settings()
    words = [
        "finetune",
        "--model",
        config.model,
        "--labels",
        "10%",
        "--layer-decay",
        "0.5",
        "--lr",
        "1e-3",
        "--dry-run",
    ]
    assert main([*words, "--dry-run", "--output", str(tmp_path / "a" / "b"), "--device", "cpu", "--workers", "0"]) == 0
    shown = capsys.readouterr().out
    rows = re.findall(r"^(\d) +(\S+) +(\S+) +(\S+) +\d+ +[\d,]+  (.*)$", shown, flags=re.M)
    assert [row[:4] for row in rows] == [
        ("0", "0.125", "0.000125", "0.05"), ("0", "0.125", "0.000125", "0"), ("1", "0.25", "0.00025", "0.05"),
        ("1", "0.25", "0.00025", "0"), ("2", "0.5", "0.0005", "0.05"), ("2", "0.5", "0.0005", "0"),
        ("3", "1", "0.001", "0.05"), ("3", "1", "0.001", "0"),
    ]  # fmt: skip
    assert "head.weight" in rows[6][4] and not list(tmp_path.iterdir())


def test_a_map_of_confusions_is_as_large_as_its_names():
    """The name of the rows was cut off at the left."""
    names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    chart = str(confusion_map(100 * np.eye(10, dtype=int), names))
    x = re.search(r"<!-- true class -->\s*<g [^>]*translate\(([-.\d]+) ", chart)
    assert x is not None and float(x[1]) > 10  # points, of the line below letters that stand upright


def test_names_of_classes_that_are_not_utf8_are_drawn_escaped():
    chart = str(confusion_map(np.eye(2, dtype=int), ["cat", os.fsdecode(b"d\xff")]))
    assert chart == str(confusion_map(np.eye(2, dtype=int), ["cat", "d\\udcff"]))


def test_labels_are_balanced_nested_and_drawn_by_the_seed():
    source = DigitsSource()
    targets, classes = source.targets()
    images = LabelledImages(source, np.arange(len(source)), torch.tensor(targets))

    def chosen(labels: str, seed: int = 0) -> set[int]:
        return set(choose_labels(images, labels, seed, classes).indices.tolist())

    for labels, least, most in (("1%", 1, 2), ("10%", 15, 15), ("7", 7, 7)):
        counts = np.bincount([targets[index] for index in chosen(labels)], minlength=10)
        assert counts.min() == least and counts.max() == most, labels
    assert len(chosen("1%")) == 15 and len(chosen("10%")) == 150
    assert chosen("1%") < chosen("10%") < chosen("50%")
    assert chosen("10%", 1) != chosen("10%") == chosen("10%")
    assert choose_labels(images, "all", 0, classes) is source is choose_labels(images, "100%", 0, classes)
    with pytest.raises(ValueError, match="labels '0.1%' of 1,500 images are 2, fewer than the 10 classes"):
        chosen("0.1%")
    # A rare class gives what it has, the others share the rest.
    few = np.flatnonzero(np.array(targets) != 3)[:400].tolist() + np.flatnonzero(np.array(targets) == 3)[:2].tolist()
    rare = LabelledImages(source, np.array(few), torch.tensor(targets)[few])
    picked = choose_labels(rare, "10%", 0, classes)
    counts = np.bincount([targets[index] for index in picked.indices], minlength=10)
    assert counts[3] == 2 and counts.sum() == 40 and counts[counts > 2].max() <= counts[counts > 2].min() + 1


@pytest.mark.parametrize("labels", ["0%", "101%", "some", "0", "-3", "%"])
def test_labels_that_are_none_are_refused(settings, labels):
    with pytest.raises(ValueError, match="labels must be all, a share such as 1% or a number of each class"):
        settings(labels=labels).check()


def test_defaults_are_by_the_number_of_labels():
    config = FinetuneConfig(model="x")
    small = config.filled(600, 10, 10_000, in_memory=True)
    assert (small["epochs"], small["mixup"], small["auto_augment"], small["erasing"]) == (56, 0.0, "none", 0.0)
    assert (small["batch_size"], small["layer_decay"], small["analyze_every"]) == (64, 0.75, 56.0)  # 504 steps
    assert config.filled(4_999, 10, 10_000, in_memory=True)["epochs"] == 20
    assert config.filled(15, 10, 10_000, in_memory=True)["batch_size"] == 2
    large = config.filled(50_000, 100, 50_000, in_memory=False)
    assert (large["epochs"], large["mixup"], large["cutmix"], large["erasing"]) == (50, 0.8, 1.0, 0.25)
    assert large["val_images"] == 10_000 and large["auto_augment"] == "rand-m9-mstd0.5-inc1"
    assert config.filled(50_000, 100, 10, in_memory=True)["auto_augment"] == "none"
    assert FinetuneConfig(model="x", from_scratch=True).filled(9, 3, 3, in_memory=True)["layer_decay"] == 1.0


@pytest.mark.parametrize(
    ("images", "changes", "deviation"),
    [
        (600, {}, 0.02),
        (50_000, {"arch": "vit_base_patch16_224"}, 2e-5),
        (50_000, {"arch": "beit_base_patch16_224"}, 2e-5),
        (50_000, {"arch": "swinv2_base_window8_256"}, 0.02),
        (50_000, {"arch": "vit_base_patch16_224", "from_scratch": True}, 0.02),
        (50_000, {"arch": "vit_base_patch16_224", "head_std": 0.01}, 0.01),
    ],
)
def test_first_weights_of_the_classifier_are_small_where_published(images, changes, deviation):
    """Random weights hardly learn behind a classifier of 2e-5."""
    config = FinetuneConfig(model="x", **changes)
    assert config.filled(images, 10, 10_000, in_memory=False)["head_std"] == deviation


def test_presets_are_the_published_recipes():
    """Layer decay, stochastic depth, epochs, warm-up and the rate of 1024 or 2048 images."""
    published = {
        "mae-vit-b": (0.65, 0.1, 100, 5, 5e-4 * 1024 / 256, 1024),
        "mae-vit-l": (0.75, 0.2, 50, 5, 1e-3 * 1024 / 256, 1024),
        "mae-vit-h": (0.75, 0.3, 50, 5, 1e-3 * 1024 / 256, 1024),
        "simmim-vit-b": (0.65, 0.1, 100, 20, 1.25e-3 * 2048 / 512, 2048),
        "simmim-swin-b-100": (0.9, 0.1, 100, 20, 1.25e-3 * 2048 / 512, 2048),
        "simmim-swin-b-800": (0.8, 0.1, 100, 20, 1.25e-3 * 2048 / 512, 2048),
        "simmim-swin-l": (0.7, 0.2, 100, 20, 1.25e-3 * 2048 / 512, 2048),
        "simmim-swinv2-b": (0.75, 0.1, 100, 20, 1.25e-3 * 2048 / 512, 2048),
    }
    assert PRESETS.keys() == published.keys()
    for name, (decay, drop_path, epochs, warmup, rate, batch) in published.items():
        config = FinetuneConfig(model="x", **PRESETS[name])
        config.check()
        assert (config.layer_decay, config.drop_path, config.epochs, config.warmup_epochs) == (
            decay, drop_path, epochs, warmup
        ), name  # fmt: skip
        assert config.blr * batch / 256 == pytest.approx(rate), name
        least = config.min_lr if config.min_blr is None else config.min_blr * batch / 256
        assert least == pytest.approx(1e-6), name
        assert (config.mixup, config.cutmix, config.erasing, config.label_smoothing) == (0.8, 1.0, 0.25, 0.1)
        assert config.clip_grad == (5.0 if name.startswith("simmim") else None) and config.weight_decay == 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "model is missing"),
        ({"layer_decay": 1.5}, r"layer_decay must be in \(0, 1\], got 1.5"),
        ({"readout": "nothing"}, "unknown pooling 'nothing'"),
        ({"readout": "attn-mn", "model": "swin_tiny_patch4_window7_224", "pretrained": False}, "needs a .cls. token"),
        ({"freeze": 3}, "freeze must be 0 to 2"),
        ({"mixup": 0.8, "batch_size": 25}, "batch_size must be even, got 25"),
        ({"auto_augment": "rand-x9"}, "auto_augment must be none or an augmentation of timm"),
        ({"model": "resnet18", "pretrained": False}, "not tokens"),
        ({"batch_size": 1000}, "the data holds 150 images, fewer than one optimizer step takes: 1000"),
        ({"ema": 1.0}, "ema must be at least 0 and below 1"),
        ({"arch": "vit_tiny_patch16_224"}, "arch cannot be given with a checkpoint of `mimkernels pretrain`"),
        ({"model_kwargs": {"img_size": 32}}, r"model_kwargs has img_size \(--img-size says it\)"),
        ({"model_kwargs": {"drop_path_rate": 0.3}}, r"drop_path_rate 0.3 \(--drop-path says 0.1\)"),
        ({"model_kwargs": {"in_chans": 3}}, "model_kwargs has in_chans 3, MAE vit_tiny.* takes 1"),
        ({"img_size": 18}, "18"),
        ({"pretrained": False}, "takes a timm name with random weights, .* has weights of its own; --from-scratch"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(settings, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(settings(**changes))
    assert not (tmp_path / "run").exists()


def test_from_scratch_has_the_architecture_and_no_weights(settings, pretrained):
    started = FinetuneRun(settings(from_scratch=True), stream=io.StringIO())
    with started._held:
        before = load(pretrained / "checkpoints" / "final.pt")["model"]
        weight = "blocks.0.mlp.fc1.weight"
        assert not torch.equal(started.model.encoder.state_dict()[weight], before[f"encoder.{weight}"])
        assert started.config.layer_decay == 1.0 and "random weights" in started._facts()["From"]
        assert {group["lr_scale"] for group in started._parameter_groups()} == {1.0}


_TIMM = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}


@pytest.mark.parametrize("by", ["command", "python"])
def test_a_run_of_a_timm_name_goes_on_by_the_same_settings(settings, tmp_path, capsys, by):
    given = {"model": "vit_tiny_patch16_224", "img_size": 16, "pretrained": False, "pictures": 0}
    run(settings(**given, model_kwargs=_TIMM, epochs=1))
    if by == "python":
        result = run(settings(**given, model_kwargs=_TIMM, epochs=2), resume="auto")
        assert result.step == result.total_steps
        return
    kwargs = [f"{name}={value}" for name, value in _TIMM.items()]
    words = ["finetune", "--output", str(tmp_path / "run"), "--resume", "--model", given["model"], "--img-size", "16"]
    assert main([*words, "--no-pretrained", "--epochs", "2", "--model-kwargs", *kwargs]) == 0
    assert main([*words, "--epochs", "3", "--model-kwargs", "patch_size=4"]) == 2
    assert "patch_size: 8 -> 4" in capsys.readouterr().err


def test_data_of_other_classes_are_refused_by_their_number(settings, tmp_path, capsys):
    run(settings(epochs=1, pictures=0))
    for name in "abc":
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (16, 16), number).save(tmp_path / "data" / name / f"{number}.png")
    words = ["finetune", "--output", str(tmp_path / "run"), "--resume", "--epochs", "2"]
    assert main([*words, "--data", str(tmp_path / "data"), "--labels", "all"]) == 2
    assert "3 classes (a, b, c), the checkpoint's run had 10" in capsys.readouterr().err


def started(config) -> FinetuneRun:
    run_ = FinetuneRun(config, stream=io.StringIO())
    run_._held.close()
    return run_


def test_random_weights_of_a_timm_name_are_those_of_the_seed(settings):
    given = {"model": "vit_tiny_patch16_224", "img_size": 16, "pretrained": False, "model_kwargs": _TIMM}
    first, again, other = (
        started(settings(**given, seed=seed)).model.encoder.blocks[0].mlp.fc1.weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_timm_name_without_weights_is_trained_from_scratch(settings):
    given = {"model": "vit_tiny_patch16_224", "img_size": 16, "pretrained": False, "model_kwargs": _TIMM}
    of_timm = started(settings(**given))
    assert of_timm.config.from_scratch and of_timm.config.layer_decay == 1.0
    assert of_timm.model.head.weight.std() > 0.01 and "random weights" in of_timm._facts()["From"]


def test_published_files_and_other_resolutions_are_started_from(settings, tmp_path, pretrained):
    size = {"img_size": 24, "in_chans": 3, "patch_size": 4}
    small = {"embed_dim": 24, "depth": 1, "num_heads": 3}
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", **size, **small)
    weights = {**encoder.state_dict(), "mask_token": torch.zeros(1, 1, 24), "decoder_pos_embed": torch.zeros(1, 37, 16)}
    torch.save({"model": weights}, tmp_path / "mae.pth")
    config = settings(model=str(tmp_path / "mae.pth"), arch="vit_tiny_patch16_224", model_kwargs=small)
    run_ = started(config)
    assert (run_.config.img_size, run_.config.patch_size, run_.config.in_chans) == (24, 4, 3)
    assert torch.equal(run_.model.encoder.blocks[0].attn.qkv.weight, encoder.blocks[0].attn.qkv.weight)
    assert run_.config.pixel_stats == "0.4850,0.4560,0.4060/0.2290,0.2240,0.2250"
    # Of a run, at another resolution.
    run_ = started(settings(img_size=32))
    assert run_.model.grid_size == (8, 8) and "resized: pos_embed: 4 x 4 to 8 x 8 patches" in run_.loaded


@pytest.mark.parametrize(
    "given",
    [
        {"model": "swin_tiny_patch4_window7_224", "img_size": 32,
         "model_kwargs": {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 2, "in_chans": 1}},
        {"model": "beit_base_patch16_224", "img_size": 16, "readout": "abmilp",
         "model_kwargs": {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4, "in_chans": 1}},
    ],
)  # fmt: skip
def test_other_families_and_poolings_train(settings, tmp_path, given):
    result = run(settings(**given, pretrained=False, epochs=1, labels="5", batch_size=25, head_stats="entropy"))
    assert result.step == 2 and 0 <= result.content.tested.accuracy <= 1
    assert (result.content.loading == "") == ("readout" in given)
