"""What the trainer offers to methods: labels, several views, schedules, hooks, metrics; and the supervised method."""

import math
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from mimkernels.commands.pretrain.methods import METHODS, Method
from mimkernels.commands.pretrain.run import Run, pretrain
from mimkernels.data.batches import Augmentation, derived_seed
from mimkernels.engine.checkpoint import load
from mimkernels.engine.training.history import read_entries
from mimkernels.models.base import ImageModel
from mimkernels.models.build import METHODS as BUILT
from mimkernels.models.build import Recipe
from tests.commands.pretrain.test_run import assert_same_bits, losses, stop_after
from tests.data.folders import fill

SUPERVISED = {"method": "supervised", "decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}


def test_a_supervised_run_learns_and_says_so(tiny):
    model = {"embed_dim": 32, "depth": 1, "num_heads": 2, "drop_path_rate": 0.0}
    result = pretrain(
        tiny(**SUPERVISED, model_kwargs=model, batch_size=50, epochs=4, lr=3e-3, crop_scale=1.0, log_every=10)
    )
    entries = read_entries(result.output / "metrics.jsonl")
    assert entries[-1]["accuracy"] > 0.3 > 0.2 > entries[0]["accuracy"]
    assert entries[0]["loss"] == pytest.approx(math.log(10), rel=0.1)
    text = (result.output / "report.html").read_text()
    assert "one of 10, from labels" in text and "Reconstructions" not in text
    weights = torch.load(result.output / "supervised_checkpoint.pth", weights_only=True)["model"]
    assert weights["head.weight"].shape == (10, 32)
    saved = load(result.output / "checkpoints" / "final.pt")
    assert (saved["config"]["num_classes"], saved["model_config"]["num_classes"]) == (10, 10)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_supervised_run_continues_with_the_same_bits(tiny, tmp_path, monkeypatch, mixed):
    changes = {**SUPERVISED, "epochs": 2, "accum_steps": 2, "batch_size": 150, "workers": 1}
    changes |= {"mixup": 0.8, "cutmix": 1.0} if mixed else {}
    whole = pretrain(tiny(**changes, output=str(tmp_path / "whole"))).output
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert pretrain(tiny(**changes, output=str(tmp_path / "parts"))).stopped_by
    np.random.seed(7)  # what mixing draws from is set by the step alone
    pretrain(tiny(**changes, output=str(tmp_path / "parts")), resume="auto")
    a, b = (load(folder / "checkpoints" / "final.pt") for folder in (whole, tmp_path / "parts"))
    for key in ("model", "optimizer"):
        assert_same_bits(a[key], b[key], key)
    assert losses(whole) == losses(tmp_path / "parts")


def test_labels_go_with_their_images_and_those_that_take_a_broken_ones_place(tiny, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(6):
            level = rng.integers(0, 100) + (150 if name == "dog" else 0)
            Image.new("L", (16, 16), int(level)).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "images" / "dog" / "0.png").write_bytes(b"broken")
    run = Run(tiny(**SUPERVISED, data=str(tmp_path / "images"), batch_size=4))
    assert run.config.num_classes == 2
    for index in range(12):
        sample = run.images[(0, index)]
        assert sample.target == int(sample.pixels.float().mean() > 125)


def test_folders_of_training_and_test_images_are_no_classes(tiny, tmp_path):
    for name in ("train/a", "train/b", "val/a", "val/b"):
        fill(tmp_path / "set" / name, count=2)
    data = str(tmp_path / "set")
    with pytest.raises(ValueError, match=r"its folders train and val are no classes; --data .*train --val-data .*val"):
        Run(tiny(**SUPERVISED, data=data))
    with pytest.warns(
        UserWarning, match="images of its folders train and val are trained on; --data .*train --val-data"
    ):
        assert len(Run(tiny(data=data, batch_size=2)).source) == 8
    parted = Run(tiny(**SUPERVISED, data=f"{data}/train", val_data=f"{data}/val", batch_size=2))
    assert parted.config.num_classes == 2 and len(parted.source) == len(parted.held_out) == 4


def test_images_without_class_folders_have_no_labels(tiny, tmp_path):
    for number in range(4):
        Image.new("L", (16, 16), number).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match="labels are the names of the folders"):
        Run(tiny(**SUPERVISED, data=str(tmp_path), batch_size=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 0.5}, "mask_ratio is an option of MAE and SimMIM, got 0.5 and method 'supervised'"),
        ({"masking": "block"}, "masking is an option of MAE and SimMIM"),
        ({"masking_kwargs": {"count": 3}}, "masking_kwargs is an option of MAE and SimMIM"),
        ({"mixup": 0.8, "batch_size": 5}, "batch_size must be even, got 5"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1"),
        ({"num_classes": 9}, "'digits' has 10 classes, num_classes is 9"),
        ({"epochs": 50, "batch_size": 5}, "batch_size must be even, got 5"),
    ],
)
def test_what_a_supervised_run_cannot_do_is_refused(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        Run(tiny(**{**SUPERVISED, **changes}))


class TwinsOutput(NamedTuple):
    loss: Tensor
    metrics: dict[str, Tensor]
    head_stats: None = None


class Twins(ImageModel):
    """A toy with two views and a teacher: the mean of a view, scaled by one weight."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(1, 1)
        self.teacher = nn.Linear(1, 1).requires_grad_(False)
        self.teacher.load_state_dict(self.encoder.state_dict())
        self.in_chans = 1
        self._set_pixel_statistics(None, None)
        self.config = {"name": "twins"}

    @classmethod
    def from_config(cls, config):
        return cls()

    def forward(self, views):
        first, second = (view.float().mean((1, 2, 3))[:, None] / 255 for view in views)
        loss = (self.encoder(first) - self.teacher(second) - 1).square().mean()
        return TwinsOutput(loss, {"shift": (first - second).mean()})


class TwinsMethod(Method):
    title, options, ops, exported, sees_all = "twins", (), (), "twins.pth", True
    masks, reconstructs = False, False
    weight_decay = 0.1
    called: ClassVar[list] = []

    @staticmethod
    def views(config, augmentation):
        def two(image, seed):
            return augmentation(image, seed), augmentation(image, derived_seed(seed, 1))[:, ::2, ::2]

        return two

    @classmethod
    def schedule(cls, config, at):
        return {"weight_decay": 0.1 + at.share, "momentum": 0.5 + at.share / 2}

    @classmethod
    def before_step(cls, model, scheduled, at):
        cls.called.append(("before_step", at.step, model.encoder.weight.grad is None))

    @classmethod
    def before_update(cls, model, scheduled, at):
        cls.called.append(("before_update", at.step, model.encoder.weight.grad is not None))
        model.encoder.bias.grad = None

    @classmethod
    def after_step(cls, model, scheduled, at):
        with torch.no_grad():
            model.teacher.weight.lerp_(model.encoder.weight, 1 - scheduled["momentum"])
        cls.called.append(("after_step", at.step, model.encoder.weight.item(), model.teacher.weight.item()))

    @staticmethod
    def blocks(model):
        return []

    @staticmethod
    def weights(model):
        return model.state_dict()

    @staticmethod
    def lead(config, masked_share):
        return "Twins."

    @staticmethod
    def loss_words(config):
        return "Their distance"


def test_views_schedules_hooks_and_a_teacher(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "twins", TwinsMethod)
    monkeypatch.setitem(BUILT, "twins", Recipe(Twins, {}))
    settings = {"method": "twins", "decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16, "workers": 1}
    TwinsMethod.called.clear()
    run = Run(tiny(**settings))
    first = run.model.encoder.weight.item()
    bias = run.model.encoder.bias.item()
    result = run.execute()
    called = TwinsMethod.called
    assert [entry[:2] for entry in called] == [
        (name, step) for step in range(5) for name in ("before_step", "before_update", "after_step")
    ]
    assert all(entry[2] for entry in called if entry[0] != "after_step")
    teacher = first
    for _, step, student, seen in called[2::3]:
        teacher = teacher + (student - teacher) * (1 - (0.5 + step / 5 / 2))
        assert seen == pytest.approx(teacher, rel=1e-5)
    saved = load(result.output / "checkpoints" / "final.pt")
    assert saved["model"]["teacher.weight"].item() == pytest.approx(teacher, rel=1e-5)
    assert saved["model"]["encoder.bias"].item() == bias  # its gradient was taken away before every update
    entries = read_entries(result.output / "metrics.jsonl")
    assert [entry["momentum"] for entry in entries] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert [entry["weight_decay"] for entry in entries] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert all(abs(entry["shift"]) < 0.05 for entry in entries) and len(result.report.read_text()) > 1000
    saved_groups = saved["optimizer"]["param_groups"]
    assert sorted(group["weight_decay"] for group in saved_groups) == [0.0, pytest.approx(0.9)]

    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert pretrain(tiny(**settings, output=str(tmp_path / "parts"))).stopped_by
    pretrain(tiny(**settings, output=str(tmp_path / "parts")), resume="auto")
    assert_same_bits(saved["model"], load(tmp_path / "parts" / "checkpoints" / "final.pt")["model"])


VIEWS = {
    "mocov3": {"method": "mocov3", "mlp_dim": 32, "out_dim": 8},
    "dino": {
        "method": "dino",
        "mlp_dim": 32,
        "bottleneck_dim": 16,
        "prototypes": 64,
        "local_crops": 1,
        "local_size": 8,
    },
}


@pytest.fixture
def of_views(tiny):
    def make(method, **changes):
        decoder = {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}
        return tiny(**decoder, **VIEWS[method], **changes)

    return make


@pytest.mark.parametrize("method", VIEWS)
def test_views_are_changed_as_little_as_settings_say(of_views, tiny, method):
    config = of_views(method, color_jitter=0.1, blur_prob=0.25, solarize_prob=0.0)
    config.check()
    views = config.the_method.views(config, Augmentation(16, 1, 0.4, False))
    for steps in views.steps:
        jitter, blur = (step for step in steps.transforms if isinstance(step, v2.RandomApply))
        assert tuple(jitter.transforms[0].brightness) == (0.9, 1.1) and blur.p == 0.25
        assert not any(isinstance(step, v2.RandomSolarize) for step in steps.transforms)
    for name, value in (("color_jitter", -0.1), ("blur_prob", 1.5), ("solarize_prob", 2.0)):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], got {value}"):
            of_views(method, **{name: value}).check()
        with pytest.raises(ValueError, match=f"{name} is an option of MoCo v3 and DINO"):
            tiny(**{name: 0.5}).check()


@pytest.mark.parametrize("method", VIEWS)
def test_views_are_learned_from_in_bf16_as_in_fp32(of_views, tmp_path, method):
    """At every step of a few, the loss; what is made of features is computed in fp32 all the same."""
    seen = []
    for precision in ("fp32", "bf16"):
        changes = {"precision": precision, "val_split": 0.9, "val_images": 8, "batch_size": 50}
        result = pretrain(of_views(method, **changes, pictures=0, output=str(tmp_path / precision)))
        seen.append(torch.tensor(losses(result.output)))
    assert len(seen[0]) == 3 and seen[1].isfinite().all()
    torch.testing.assert_close(*seen, rtol=0.03, atol=0)
