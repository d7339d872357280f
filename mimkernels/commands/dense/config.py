"""Settings of dense readouts, and the layers that ``--layers`` names."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from mimkernels.engine.model_names import parse_models
from mimkernels.engine.settings import DEVICES, PRECISIONS, Settings, require, require_seed, setting

TEST_ON = ("square", "whole")

_MOST_LAYERS = 1000  # of an encoder


@dataclass
class DenseConfig(Settings):
    """Everything that the results depend on. Saved as ``config.json`` in the output folder."""

    models: list[str] = field(
        default_factory=list,
        metadata={
            "help": "run folder or checkpoint of `mimkernels pretrain`, a published checkpoint, or a timm name; "
            "NAME=MODEL names it; options follow colons: arch, img_size, pretrained, and timm's own, as in "
            "small=vit_tiny_patch16_224:img_size=96:patch_size=8",
            "group": "models", "positional": True, "nargs": "+", "metavar": "MODEL",
        },
    )  # fmt: skip
    layers: str = setting(
        "last", "layers to read from, each by itself: numbers from 1 on, last, or each for all of them; 3+6+9 are read "
        "together, quarters are four at equal steps, together", "models", metavar="LAYERS",
    )  # fmt: skip

    data: str = setting(
        "scenes", "scenes: rooms cast ray by ray, with exact labels and depths; figures: bodies with exact joints; of "
        "--data-root, ade20k: labels, nyuv2: depths, coco-keypoints: persons, cut out by their boxes; or images alone: "
        "digits, fashion-mnist, torchvision:NAME or a folder", "data",
    )  # fmt: skip
    data_root: str = setting("", "folder of data that are not made", "data", metavar="DIR")
    depth_scale: float = setting(1000.0, "of nyuv2: levels of its depth pictures per metre", "data")
    train_images: int = setting(200, "images to learn from; of a folder, at most", "data")
    test_images: int = setting(50, "images to test on; of a folder, at most", "data")
    copies: int = setting(
        0, "learn from so many crops of each image, some mirrored, in its place: for labels zoomed by 0.5 to 2, of "
        "nyuv2 416 x 544 of 480 x 640 pixels, by windows of --side", "data",
    )  # fmt: skip
    flip_test: bool | None = setting(
        None, "average labels or depths that are read of each test image with those of its mirror image (default: of "
        "nyuv2 yes, as published; else no)", "data",
    )  # fmt: skip
    test_on: str = setting(
        "square", "of ade20k and nyuv2: the middle square of each test image, or the whole of it, by sliding windows "
        "of --side", "data", choices=TEST_ON,
    )  # fmt: skip
    side: int = setting(96, "pixels a side of images and labels; every encoder gets its own size", "data")

    tasks: str = setting(
        "all", "what is read: segmentation, depth and keypoints by linear layers, knn: segmentation by the nearest "
        "patches, correspondence: points found again in the image warped, both without training; all that the data "
        "have targets of", "readout", metavar="NAMES",
    )  # fmt: skip
    steps: int = setting(1000, "steps of training, of each linear layer", "readout")
    batch_size: int = setting(16, "images per step", "readout")
    lr: float = setting(1e-3, "peak learning rate of AdamW", "readout")
    weight_decay: float = setting(1e-3, "of segmentation and keypoints; depth has a tenth, as published", "readout")
    dropout: float = setting(0.1, "share of channels dropped before the segmentation", "readout")
    depth_bins: int = setting(256, "depths that the depth is a mean of", "readout")
    neighbours: int = setting(20, "nearest patches that vote", "readout")
    seed: int = setting(0, "seed of images, weights and order", "readout")

    encoder_batch: int = setting(32, "images at a time in the encoder", "execution")
    device: str = setting("auto", "where to compute", "execution", choices=DEVICES)
    precision: str = setting("auto", "of the encoder; auto takes bf16 where it is fast", "execution",
                             choices=PRECISIONS)  # fmt: skip
    output: str = setting("runs/dense", "output folder", "output", metavar="DIR", short="-o")
    pictures: int = setting(4, "test images in the report", "output")
    title: str = setting("", "title of the report", "output")

    def check(self) -> None:
        """Raise ValueError for values that cannot work, before anything is read or written; the run checks the names of
        data and tasks, which need torch."""
        if not self.models:
            raise ValueError("models are missing: name at least one run folder, checkpoint or timm model")
        for name in ("train_images", "batch_size"):
            require(getattr(self, name) >= 2, name, getattr(self, name), "at least 2 (batches are normalised)")
        for name in ("test_images", "steps", "encoder_batch", "neighbours"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.side >= 8, "side", self.side, "at least 8")
        require(self.depth_bins >= 2, "depth_bins", self.depth_bins, "at least 2")
        require(self.depth_scale > 0 and math.isfinite(self.depth_scale), "depth_scale", self.depth_scale,
                "positive and finite")  # fmt: skip
        require(self.data == "nyuv2" or self.depth_scale == DenseConfig.depth_scale, "depth_scale", self.depth_scale,
                f"left out: it is of data 'nyuv2', not {self.data!r}")  # fmt: skip
        require_seed(self.seed)
        for name in ("pictures", "copies"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.lr > 0 and math.isfinite(self.lr), "lr", self.lr, "positive and finite")
        decay = self.weight_decay
        require(decay >= 0 and math.isfinite(decay), "weight_decay", decay, "0 or more and finite")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        for name, known in (("test_on", TEST_ON), ("device", DEVICES), ("precision", PRECISIONS)):
            require(getattr(self, name) in known, name, getattr(self, name), f"one of {', '.join(known)}")
        names = [choice.name for choice in parse_models(self.models)]
        require(len(set(names)) == len(names), "models", ", ".join(names), "of different names")
        parse_layers(self.layers)

    @property
    def chosen_tasks(self) -> list[str]:
        """Names of tasks; none for all that the data have targets of."""
        return [] if self.tasks == "all" else [task.strip() for task in self.tasks.split(",")]


class Readout(NamedTuple):
    """Layers of an encoder that are read together."""

    label: str
    layers: tuple[int, ...]  # from 1 on


def parse_layers(text: str, count: int | None = None, model: str = "") -> list[Readout]:
    """The entries of ``--layers`` for an encoder of `count` layers, called `model`; ValueError says what is wrong.

    Without `count` what is wrong for every encoder.
    """
    wanted = "at least 1" if count is None else f"in 1..{count} of {model!r}"
    count = 1 << 30 if count is None else count
    readouts: list[Readout] = []
    for part in (part.strip() for part in text.split(",")):
        if part == "each":
            readouts += [Readout(str(layer), (layer,)) for layer in range(1, min(count, _MOST_LAYERS) + 1)]
            continue
        if part == "quarters":
            layers = tuple(dict.fromkeys(max(1, round(count * quarter / 4)) for quarter in range(1, 5)))
        else:
            try:
                layers = tuple(count if name.strip() == "last" else int(name) for name in part.split("+"))
            except ValueError:
                raise ValueError(
                    f"layers must be numbers, last, quarters or each, joined by + where they are read together, got "
                    f"{part!r}"
                ) from None
        for layer in layers:
            require(1 <= layer <= count, "layers", layer, wanted)
        readouts.append(Readout("+".join(map(str, layers)), layers))
    return list(dict.fromkeys(readouts))
