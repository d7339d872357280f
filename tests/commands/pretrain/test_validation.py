"""Validation loss: the same images under the same masks every time, by any number of processes, without a trace."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.methods import METHODS
from mimkernels.commands.pretrain.report import References, Report
from mimkernels.commands.pretrain.run import Run, pretrain
from mimkernels.engine.checkpoint import load
from mimkernels.engine.training.history import read_entries
from mimkernels.engine.training.validation import calling
from mimkernels.models.build import METHODS as BUILT
from mimkernels.models.build import Recipe
from mimkernels.ops import random_mask
from tests.commands.pretrain.test_methods import SUPERVISED, Twins, TwinsMethod
from tests.commands.pretrain.test_run import assert_same_bits, stop_after

SIMMIM = {"method": "simmim", "mask_unit": 4, "decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}
SWIN = {
    **SIMMIM, "model": "swin_tiny_patch4_window7_224", "patch_size": 2, "target": "patch-norm",
    "model_kwargs": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture
def checked(tiny, tmp_path):
    """Runs that are ready to start, each with a folder of its own."""
    number = itertools.count()

    def make(**settings) -> Run:
        return Run(tiny(**settings, output=str(tmp_path / f"run-{next(number)}")))

    return make


def validated(folder) -> list[tuple[int, float]]:
    return [(e["step"], e["val_loss"]) for e in read_entries(folder / "metrics.jsonl") if "val_loss" in e]


def test_the_loss_is_the_mean_over_fixed_masks_of_each_image(checked):
    run = checked(val_images=10, val_masks=3, batch_size=4, seed=5)
    model, validation = run.model.eval(), run.validation
    assert validation.positions == [number * 297 // 10 for number in range(10)]
    images = torch.stack([run.augmentation.plain(run.held_out.read(i)) for i in validation.positions])
    losses = []
    with torch.no_grad():
        for draw in range(3):
            mask = random_mask(10, 16, 4, 0, 2**41 + draw).mask.bool().unflatten(1, (4, 4))
            losses += [model(images[i : i + 1], mask=mask[i : i + 1]).loss for i in range(10)]
    assert len({mask.numpy().tobytes() for mask in validation._masks.flatten(0, 1)}) > 25
    assert validation.measure(model, CPU) == {"loss": pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)}


@pytest.mark.parametrize("settings", [{}, SIMMIM, SWIN, {**SUPERVISED}], ids=["mae", "simmim", "swin", "supervised"])
def test_batch_size_seed_and_processes_change_nothing(checked, settings):
    """Processes call the model equally often, though there are fewer batches than processes."""
    whole = checked(**settings, val_images=7, batch_size=7)
    model = whole.model.eval()
    expected = whole.validation.measure(model, CPU)
    assert expected["loss"] > 0
    for processes, batch_size in ((2, 3), (4, 3), (3, 7)):
        totals, calls = {}, []
        for rank in range(processes):
            validation = checked(**settings, val_images=7, batch_size=batch_size, seed=rank).validation
            count = 0

            def compute(images, arguments):
                nonlocal count
                count += 1
                return calling(model)(images, arguments)

            for name, total in validation.sums(compute, CPU, rank, processes).items():
                totals[name] = totals.get(name, 0) + total
            calls.append(count)
        assert validation.values(totals) == pytest.approx(expected, rel=1e-5)
        assert len(set(calls)) == 1


def test_masks_of_different_counts_weigh_by_what_they_hide(checked):
    """Of the batches some hide nothing."""
    run = checked(masking="ibot", val_images=12, val_masks=2, batch_size=2)
    validation, model = run.validation, run.model.eval()
    masks = validation._masks
    assert 0 < masks.flatten(2).any(2).sum() < 24 and not masks.unflatten(1, (6, 2)).flatten(2).any(2).all()
    images = torch.stack([run.augmentation.plain(run.held_out.read(i)) for i in validation.positions])
    with torch.no_grad():
        pairs = [(model(images[[i]], mask=mask[[i]]).loss.item(), int(mask[i].sum()))
                 for mask in masks for i in range(12) if mask[i].any()]  # fmt: skip
    expected = sum(loss * count for loss, count in pairs) / sum(count for _, count in pairs)
    assert validation.measure(model, CPU)["loss"] == pytest.approx(expected, rel=1e-5)


def test_training_goes_on_as_if_nobody_had_looked(tiny, tmp_path):
    settings = {"epochs": 2, "model_kwargs": {"embed_dim": 16, "depth": 1, "num_heads": 2, "drop_path_rate": 0.2}}
    often = pretrain(tiny(**settings, val_every=0.4, output=str(tmp_path / "often"))).output
    once = pretrain(tiny(**settings, val_every=0, output=str(tmp_path / "once"))).output
    assert [step for step, _ in validated(often)] == [2, 4, 6, 8, 10]
    assert validated(once) == validated(often)[-1:]
    states = [load(folder / "checkpoints" / "final.pt")["model"] for folder in (often, once)]
    assert_same_bits(*states)


def test_a_run_that_is_continued_validates_to_the_same_bits(tiny, tmp_path, monkeypatch):
    settings = {**SUPERVISED, "epochs": 2, "val_every": 0.4, "log_every": 3}
    whole = pretrain(tiny(**settings, output=str(tmp_path / "whole"))).output
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        assert pretrain(tiny(**settings)).stopped_by
    pretrain(tiny(**settings), resume="auto")
    assert validated(tmp_path / "run") == validated(whole) and len(validated(whole)) == 5
    entries = [entry for entry in read_entries(whole / "metrics.jsonl") if "val_loss" in entry]
    assert all(0 <= entry["val_accuracy"] <= 1 for entry in entries)


def test_a_run_that_is_continued_tells_of_other_images_to_validate_on(tiny, tmp_path, capsys):
    for number in range(3):
        (tmp_path / "val").mkdir(exist_ok=True)
        Image.new("L", (16, 16), 80 * number).save(tmp_path / "val" / f"{number}.png")
    settings = {"val_data": str(tmp_path / "val"), "val_masks": 1, "pictures": 0}
    pretrain(tiny(**settings))
    pretrain(tiny(**settings), resume="auto")
    assert "to validate on" not in capsys.readouterr().out
    (tmp_path / "val" / "1.png").unlink()
    pretrain(tiny(**settings), resume="auto")
    told = capsys.readouterr().out
    assert "warning: the images to validate on are not those of the checkpoint: folder/3/" in told
    assert ", 2 images, 1 masks now; validations before and after do not compare" in told


def test_images_to_validate_on_are_a_folder_or_a_share(checked, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("train/a", "train/b", "val/b"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(10):
            picture = Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8))
            picture.save(tmp_path / name / f"{number}.png")
    (tmp_path / "val" / "b" / "3.png").write_bytes(b"broken")
    data = {"data": str(tmp_path / "train"), "batch_size": 4}
    assert checked(**data).validation is None
    run = checked(**SUPERVISED, **data, val_data=str(tmp_path / "val"))
    assert run.validation.targets == [1] * 10 and len(run.source) == 20
    with pytest.warns(UserWarning, match=r"cannot read .*val/b/3.png, validation goes without it"):
        assert run.validation.measure(run.model.eval(), CPU)["loss"] > 0
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"none of the 1 images of .*broken' to validate on can be read.*0.png"):
        checked(**data, val_data=str(tmp_path / "broken"))
    run = checked(**data, val_split=0.25)
    assert (len(run.source), len(run.held_out)) == (15, 5)
    assert checked(**data, val_data="digits").validation.told() == "297 images of digits, 4 masks each"
    with pytest.raises(ValueError, match=r"give val_data or val_split, got 'digits' and 0.5"):
        checked(val_data="digits", val_split=0.5)
    for name, value in (("val_split", 1.0), ("val_every", -1.0), ("val_images", 0), ("val_masks", 0)):
        with pytest.raises(ValueError, match=f"{name} must be .*got {value}"):
            checked(**{name: value})


def test_views_are_the_same_every_time(checked, monkeypatch):
    monkeypatch.setitem(METHODS, "twins", TwinsMethod)
    monkeypatch.setitem(BUILT, "twins", Recipe(Twins, {}))
    settings = {"method": "twins", "decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16, "val_images": 9}
    first, second = (checked(**settings, seed=seed, batch_size=size) for seed, size in ((0, 9), (1, 4)))
    measured = [run.validation.measure(first.model.eval(), CPU) for run in (first, second)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-5) and set(measured[0]) == {"loss", "shift"}


def test_the_loss_of_predicting_the_mean_is_known(checked):
    run = checked(val_images=20)
    images = torch.stack([run.augmentation.plain(run.held_out.read(i)) for i in run.validation.positions]) / 255
    patches = images[:, 0].unfold(1, 4, 4).unfold(2, 4, 4).flatten(3) / 0.226  # [n, 4, 4, 16]
    variance = patches.var(3)[None].expand(4, -1, -1, -1)[run.validation._masks]  # divides by 15
    expected = (15 / 16 * variance / (variance + 1e-6)).mean().item()
    assert run._references(run.model.eval()).blind == pytest.approx(expected, rel=1e-4)
    run = checked(val_images=20, norm_pix_loss=False, mask_ratio=0.9)
    hidden = run.validation._masks.repeat_interleave(4, 2).repeat_interleave(4, 3)
    squares = ((images[:, 0] - images.mean()) / 0.226).square()
    expected = (squares * hidden).sum() / hidden.sum()
    assert run._references(run.model.eval()).blind == pytest.approx(expected.item(), rel=1e-4)
    run = checked(**SIMMIM, val_images=20)
    hidden = run.validation._masks.repeat_interleave(4, 2).repeat_interleave(4, 3)
    expected = (squares.sqrt() * hidden).sum() / hidden.sum()
    assert run._references(run.model.eval()).blind == pytest.approx(expected.item(), rel=1e-4)
    run = checked(**SUPERVISED, val_images=297)
    shares = torch.bincount(torch.tensor(run.validation.targets), minlength=10) / 297 * 0.9 + 0.01
    references = run._references(run.model.eval())
    assert references.blind == pytest.approx(-(shares * shares.log()).sum().item(), rel=1e-5)
    assert references.untrained == references.now  # nothing has been trained


@pytest.mark.parametrize(
    ("seen", "blind", "said"),
    [
        ([0.9, 0.6, 0.5], 1.0, "The loss is 50% below that of predicting the mean: the model uses what it sees. On new "
                               "images it is still falling."),
        ([0.9, 0.5, 0.6], 1.0, "it was lowest, 0.5, at epoch 2 and has risen to 0.6 since: the model overfits."),
        ([1.2, 1.0, 0.995], 1.0, "The loss is not below that of predicting the mean: the model has not learned"),
        ([0.9, 0.5, 0.4], 0.0, "The loss of predicting the mean is 0 on these images, which cannot tell whether"),
    ],
)  # fmt: skip
def test_the_report_says_whether_the_loss_is_normal(seen, blind, said):
    entries = [{"step": 5 * (i + 1), "loss": value, "val_loss": value} for i, value in enumerate(seen)]
    references = References("predicting the mean", blind, {"loss": 2.0}, {"loss": seen[-1]})
    config = PretrainConfig(data="digits")
    report = SimpleNamespace(config=config, entries=entries, references=references, steps_per_epoch=5)
    assert said in Report.verdict.fget(report)
    assert Report.comparisons.fget(report)[:2] == [
        ("the untrained model, on new images", "2"), ("predicting the mean, on new images", f"{blind:.4g}")
    ]  # fmt: skip
