"""What a probe makes of an output folder that was overwritten, cut off or tampered with, and of data it cannot read."""

import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from mimkernels.commands.pretrain.run import pretrain
from mimkernels.commands.probe.config import ProbeConfig
from mimkernels.commands.probe.results import PoolingResult
from mimkernels.commands.probe.run import ProbeRun, probe
from mimkernels.commands.probe.train import ProbeTrainer
from mimkernels.engine.command import TrainingError
from mimkernels.engine.encoder import load_encoder
from mimkernels.models import MAE


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Two class folders of 15 one-coloured pictures."""
    folder = tmp_path_factory.mktemp("flags")
    for kind, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
        (folder / kind).mkdir()
        for number in range(15):
            noise = np.random.default_rng(number).integers(0, 50, (16, 16, 3))
            Image.fromarray((noise + np.array(colour)).astype(np.uint8)).save(folder / kind / f"{number}.png")
    return folder


@pytest.fixture
def config(flags, tmp_path):
    """4 steps per epoch, 3 epochs; an encoder with random weights."""

    def make(**changes) -> ProbeConfig:
        values = {
            "model": "vit_tiny_patch16_224", "pretrained": False, "img_size": 16, "data": str(flags), "epochs": 3,
            "model_kwargs": {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}, "batch_size": 6,
            "pooling": "cls,abmilp", "device": "cpu", "precision": "fp32", "workers": 0, "pictures": 2,
            "output": str(tmp_path / "probe"),
        }  # fmt: skip
        torch.manual_seed(0)
        return ProbeConfig(**{**values, **changes})

    return make


def run(config, **options):
    torch.manual_seed(0)  # of the encoder's weights
    return probe(config, **options)


def stop(config, monkeypatch, step=6, **options):
    """Press Ctrl-C while step number ``step`` is running."""
    train_step, pressed = ProbeTrainer._train_step, []

    def pressing(self, *arguments):
        if self.step == step and not pressed:
            pressed.append(signal.raise_signal(signal.SIGINT))
        return train_step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ProbeTrainer, "_train_step", pressing)
        assert run(config, **options).stopped_by == signal.SIGINT


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    content[content.index(b"PK\x01\x02") + 20] ^= 1  # the size of its first part
    path.write_bytes(content)


def test_overwrite_begins_anew(config, monkeypatch, capsys):
    stop(config(), monkeypatch)
    capsys.readouterr()
    run(config(), overwrite=True)
    assert "continuing" not in capsys.readouterr().out


def test_an_overwrite_that_is_interrupted_leaves_nothing_of_the_time_before(config, monkeypatch, capsys, tmp_path):
    first = run(config(pooling="cls,abmilp,mean"))
    stop(config(), monkeypatch, overwrite=True)
    assert sorted(os.listdir(tmp_path / "probe")) == ["config.json", "probes", "unfinished.pt"]
    assert os.listdir(tmp_path / "probe" / "probes") == []
    capsys.readouterr()
    again = run(config())
    told = capsys.readouterr().out
    assert "continuing at step 7" in told and "kept from" not in told
    assert [one.losses for one in again.results] == [one.losses for one in first.results[:2]]


@pytest.mark.parametrize(
    "damage", [cut, flip, lambda path: torch.save({"identity": 1}, path)], ids=["cut", "flip", "other"]
)
def test_damaged_progress_is_said_and_trained_anew(config, monkeypatch, capsys, tmp_path, damage):
    whole = run(config(output=str(tmp_path / "whole")))
    stop(config(), monkeypatch)
    damage(tmp_path / "probe" / "unfinished.pt")
    capsys.readouterr()
    again = run(config())
    told = capsys.readouterr().out
    assert "continuing" not in told
    assert [one.losses for one in again.results] == [one.losses for one in whole.results]
    assert not (tmp_path / "probe" / "unfinished.pt").exists()
    if damage in (cut, flip):
        assert re.search(r"(?m)^warning: .*unfinished\.pt' cannot be read: it is damaged.*trained anew$", told)


@pytest.mark.parametrize("damage", [cut, flip, os.unlink], ids=["cut", "flip", "removed"])
def test_damaged_weights_of_a_finished_pooling_are_said_and_trained_anew(config, capsys, tmp_path, damage):
    first = run(config())
    kept = tmp_path / "probe" / "probes" / "abmilp.pt"
    before = torch.load(kept, weights_only=True)["probe"]
    damage(kept)
    capsys.readouterr()
    again = run(config())
    told = capsys.readouterr().out
    assert re.search(r"(?m)^warning: .*abmilp\.pt'.*; abmilp is trained anew$", told)
    assert re.search(r"(?m)^kept from .*: cls$", told)
    after = torch.load(kept, weights_only=True)["probe"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [one.accuracy for one in again.results] == [one.accuracy for one in first.results]


def test_weights_of_another_shape_are_no_weights_of_this_pooling(config, capsys, tmp_path):
    run(config())
    content = torch.load(tmp_path / "probe" / "probes" / "cls.pt", weights_only=True)
    content["probe"]["linear.weight"] = torch.zeros(3, 3)
    torch.save(content, tmp_path / "probe" / "probes" / "cls.pt")
    capsys.readouterr()
    run(config())
    assert re.search(
        r"(?m)^warning: .*linear\.weight: checkpoint \[3, 3\].*; cls is trained anew$", capsys.readouterr().out
    )


def wrong_momentum(state):
    next(iter(state["optimizer"]["state"].values()))["momentum_buffer"] = torch.zeros(3)


@pytest.mark.parametrize(
    "change",
    [lambda state: state.update(optimizer={}), wrong_momentum, lambda state: state.update(losses="low"),
     lambda state: state["probe"].popitem(), lambda state: state.update(epoch_loss=3)],
    ids=["optimizer", "momentum", "losses", "weights", "loss"],
)  # fmt: skip
def test_progress_that_does_not_fit_its_poolings_is_one_line(config, monkeypatch, tmp_path, change):
    stop(config(), monkeypatch)
    path = tmp_path / "probe" / "unfinished.pt"
    content = torch.load(path, weights_only=True)
    change(content["probes"]["cls"])
    torch.save(content, path)
    with pytest.raises(TrainingError, match=r"unfinished\.pt' does not fit pooling 'cls': remove it, or --overwrite"):
        run(config())


@pytest.mark.parametrize("content", ["{", "[]", '{"results": [{"label": "cls"}], "identity": {}}', '{"results": 3}'])
def test_results_that_cannot_be_read_are_refused_by_name(config, tmp_path, content):
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json' is no result of a probe: replace it with --overwrite"):
        run(config())


@pytest.mark.parametrize(
    ("name", "value"),
    [("accuracy", -1.0), ("accuracy", float("nan")), ("knn", 10**400), ("test_images", -1), ("seconds", float("nan")),
     ("seconds", float("inf")), ("classifier_parameters", 10**400)],
)  # fmt: skip
def test_results_edited_to_what_no_probe_gives_are_refused(config, tmp_path, name, value):
    entry = {
        "label": "cls", "description": "", "accuracy": 0.5, "test_images": 2, "knn": None, "logistic": 1, "seconds": 0,
        "pooling_parameters": 0, "classifier_parameters": 1, "losses": [1.0],
    }  # fmt: skip
    assert PoolingResult.from_entry(entry).logistic == 1
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "results.json").write_text(json.dumps({"results": [{**entry, name: value}], "identity": {}}))
    with pytest.raises(ValueError, match=r"results\.json' is no result of a probe: replace it with --overwrite"):
        run(config())


def test_what_killed_writers_left_is_swept(config, tmp_path):
    (tmp_path / "probe" / "probes").mkdir(parents=True)
    for name in (".unfinished.pt.abcdefgh.tmp", "probes/.cls.pt.abcdefgh.tmp"):
        (tmp_path / "probe" / name).write_bytes(b"half")
    run(config())
    assert not list((tmp_path / "probe").rglob(".*"))


def spoil(flags, folder, readable):
    """A copy of which only so many images can be read, of both classes."""
    for number, path in enumerate(sorted(flags.rglob("*.png"))):
        target = folder / path.relative_to(flags)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes() if number % 15 < readable // 2 else b"no picture")


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_fewer_readable_images_than_a_batch_is_one_line(config, flags, tmp_path):
    spoil(flags, tmp_path / "data", readable=14)
    with pytest.raises(TrainingError, match=r"\d+ of 24 training images can be read, fewer than batch_size 20.*lower"):
        run(config(data=str(tmp_path / "data"), batch_size=20))


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_a_batch_with_one_readable_image_is_one_line(config, flags, tmp_path):
    spoil(flags, tmp_path / "data", readable=6)
    with pytest.raises(TrainingError, match=r"^[01] of a batch's 4 images can be read, 2 are needed"):
        run(config(data=str(tmp_path / "data"), batch_size=4, augment=True, pooling="abmilp"))


def test_a_full_disk_is_one_line(config, monkeypatch):
    def refuse(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("mimkernels.engine.files.save", refuse)
    with pytest.raises(TrainingError, match=r"^No space left on device: '.*cls\.pt'; the same command goes on"):
        run(config())


def test_a_damaged_run_names_its_whole_checkpoint(tiny, config, tmp_path):
    pretrain(tiny(pictures=0, save_every=0.4))
    folder = tmp_path / "run" / "checkpoints"
    cut(folder / "final.pt")
    with pytest.raises(ValueError, match=r"final\.pt' cannot be read: .*as --model: .*step-00000004\.pt$"):
        load_encoder(config(model=str(tmp_path / "run"), pretrained=True, img_size=None, model_kwargs={}))


def test_a_checkpoint_of_another_trainer_may_hold_its_step_and_optimizer(config, tmp_path):
    model = MAE.from_timm(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, decoder_dim=16, decoder_depth=1, decoder_heads=2
    )
    state = {f"module.{name}": weight for name, weight in model.mae_state_dict().items()}
    torch.save({"model": state, "optimizer": {}, "step": 5}, tmp_path / "mae.pth")
    encoder = load_encoder(config(model=str(tmp_path / "mae.pth"), pretrained=True, img_size=None, model_kwargs={}))
    assert (encoder.dim, encoder.num_tokens) == (192, 5)


@pytest.mark.parametrize(
    ("missing", "found"),
    [
        (
            "pos_embed",
            "there is no pos_embed, so its positions are of another kind .*; its .* weights begin with cls_token",
        ),
        ("patch_embed.proj.weight", "there is no patch_embed.proj.weight, so it is not timm's or MAE's"),
    ],
)
def test_a_checkpoint_without_a_needed_weight_says_which(config, tmp_path, missing, found):
    model = MAE.from_timm("vit_tiny_patch16_224", img_size=32, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    weights = dict(model.mae_state_dict())
    del weights[missing]
    torch.save({"model": weights}, tmp_path / "mae.pth")
    with pytest.raises(ValueError, match=rf"mae\.pth': {found}"):
        load_encoder(config(model=str(tmp_path / "mae.pth"), pretrained=True, img_size=None, model_kwargs={}))


def test_saved_results_are_whole_json(config, tmp_path):
    run(config())
    saved = json.loads((tmp_path / "probe" / "results.json").read_text())
    assert [one["label"] for one in saved["results"]] == ["cls", "abmilp"]
    torch.manual_seed(0)
    assert set(ProbeRun(config()).finished) == {"cls", "abmilp"}
