"""Settings of a probe, and the poolings that its ``--pooling`` names."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mimkernels.data import MAX_PIXELS
from mimkernels.engine.settings import DEVICES, PRECISIONS, Settings, require, require_seed, setting

if TYPE_CHECKING:
    from mimkernels.nn.pooling_choice import PoolingChoice

OPTIMIZERS = ("lars", "adamw", "sgd")

# LARS moves a matrix, per step, by a share of its length: the trust coefficient times the learning rate. The published
# recipe (blr 0.1, batch 16384, 90 epochs of ImageNet) takes steps enough with the usual coefficient; the few of a small
# set would leave the weights where they began. So much the shares of all steps, at the peak rate, add up to at least,
# none being more than a hundredth.
_TRUST = 0.001
_LEAST_TRAVEL, _LONGEST_STEP = 1.35, 0.01


@dataclass
class ProbeConfig(Settings):
    """Everything that the result of a probe depends on. Saved as ``config.json`` in the output folder."""

    model: str = setting(
        "", "frozen encoder: a run folder or checkpoint of `mimkernels pretrain`, a published checkpoint (of MAE, "
        "DINO, DINOv2, BEiT, data2vec 2 and others; with --arch, of Swin), or a timm name", "encoder", metavar="MODEL",
    )  # fmt: skip
    arch: str | None = setting(
        None, "timm name of a published checkpoint's encoder (default: by the shapes of its weights)", "encoder"
    )
    model_kwargs: dict = field(
        default_factory=dict,
        metadata={"help": "further timm model arguments, with --arch or a timm name", "group": "encoder"},
    )
    pretrained: bool = setting(True, "load the published weights of a timm name", "encoder")
    img_size: int | None = setting(None, "image side in pixels (default: the encoder's own)", "encoder")
    final_norm: bool = setting(
        True, "tokens after the encoder's last norm, as MAE's probe; without, as Beyond-[cls]'s", "encoder"
    )

    data: str = setting("digits", "digits (embedded), fashion-mnist, a folder of class folders, or a folder with train "
                        "and val folders of them, or torchvision:NAME", "data", metavar="DATA")  # fmt: skip
    data_root: str = setting(
        "data",
        "where fashion-mnist is looked for, and torchvision sets are kept or downloaded to",
        "data",
        metavar="DIR",
    )
    val_data: str | None = setting(
        None, "folder of class folders to test on (default: the data's own, or held out)", "data", metavar="DIR"
    )
    val_share: float = setting(0.2, "share of every class held out for the test where the data has no split", "data")
    max_pixels: int = setting(MAX_PIXELS, "refuse image files of more pixels, before they are decoded", "data")
    pixel_range: str | None = setting(
        None, "values that become black and white in grey images of more than 8 bits, or auto (default: the range that "
        "the encoder was pre-trained with, otherwise auto)", "data", metavar="LOW,HIGH",
    )  # fmt: skip
    augment: bool = setting(
        False, "crop and mirror training images at random, as published; the encoder then runs every epoch", "data"
    )
    crop_scale: float | None = setting(None, "with --augment: smallest area of the crop (default: 0.08; digits: 0.6)",
                                       "data")  # fmt: skip
    workers: int | None = setting(None, "data-loading processes; 0 for none (default: by the cores)", "data")
    cache_gib: float = setting(4.0, "keep token features in memory up to this size, encode them anew every epoch "
                               "beyond it", "data")  # fmt: skip

    pooling: str = setting(
        "cls,mean,abmilp,ep", "poolings to compare, with options after colons: abmilp:depth=2,ep:num_queries=16; "
        "`mimkernels probe --list` shows all", "probe", metavar="NAMES",
    )  # fmt: skip
    epochs: int = setting(90, "passes over the training images", "probe")
    batch_size: int = setting(256, "images per step", "probe")
    warmup_epochs: float | None = setting(None, "epochs of linear warm-up (default: a ninth of all: 10 of 90)", "probe")
    optimizer: str = setting("lars", "optimizer of the probes", "probe", choices=OPTIMIZERS)
    blr: float = setting(0.1, "base learning rate: lr = blr * batch size / 256", "probe")
    lr: float | None = setting(None, "learning rate as it is, in place of --blr", "probe")
    trust: float | None = setting(
        None, "trust coefficient of lars (default: 0.001 as published, more where a small set has few steps)", "probe"
    )
    weight_decay: float = setting(0.0, "weight decay", "probe")
    momentum: float = setting(0.9, "of lars and sgd", "probe")
    seed: int = setting(0, "seed of weights, order and augmentation", "probe")
    knn: int = setting(20, "neighbours of the k-NN classifier on poolings without parameters; 0 for none", "probe")
    logistic: bool = setting(
        False, "also fit scikit-learn's logistic regression on poolings without parameters", "probe"
    )

    device: str = setting("auto", "where to compute", "execution", choices=DEVICES)
    precision: str = setting("auto", "of the encoder; auto takes bf16 where it is fast", "execution",
                             choices=PRECISIONS)  # fmt: skip
    output: str = setting("runs/probe", "output folder", "output", metavar="DIR", short="-o")
    pictures: int = setting(8, "images in the report with the attention of every pooling", "output")
    title: str = setting("", "title of the report", "output")

    def check(self) -> None:
        """Raise ValueError for values that cannot work, before anything is read or written."""
        from mimkernels.data.pixels import Decoder

        if not self.model:
            raise ValueError("model is missing: --model takes a run folder, a checkpoint or a timm name")
        for name in ("epochs", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "at least 2 (the classifier normalises batches)")
        require_seed(self.seed)
        for name in ("workers", "pictures", "knn"):
            value = getattr(self, name)
            require(value is None or value >= 0, name, value, "0 or more")
        require(self.img_size is None or self.img_size >= 1, "img_size", self.img_size, "at least 1")
        require(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, f"one of {', '.join(OPTIMIZERS)}")
        require(self.device in DEVICES, "device", self.device, f"one of {', '.join(DEVICES)}")
        require(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        require(0 < self.val_share < 1, "val_share", self.val_share, "between 0 and 1, both excluded")
        require(self.crop_scale is None or 0 < self.crop_scale <= 1, "crop_scale", self.crop_scale, "in (0, 1]")
        for name in ("blr", "lr", "trust"):
            value = getattr(self, name)
            require(value is None or (value > 0 and math.isfinite(value)), name, value, "positive and finite")
        for name in ("weight_decay", "cache_gib"):
            value = getattr(self, name)
            require(value >= 0 and math.isfinite(value), name, value, "0 or more and finite")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        warmup = self.warmup_epochs
        require(warmup is None or 0 <= warmup <= self.epochs, "warmup_epochs", warmup, f"in 0..{self.epochs} (epochs)")
        Decoder.from_settings(self.max_pixels, self.pixel_range or "auto")
        parse_poolings(self.pooling)

    @property
    def peak_lr(self) -> float:
        return self.blr * self.batch_size / 256 if self.lr is None else self.lr

    def trust_coefficient(self, steps: int) -> float:
        """The trust coefficient of LARS for a training of so many steps."""
        if self.trust is not None:
            return self.trust
        return max(_TRUST, min(_LONGEST_STEP, _LEAST_TRAVEL / steps) / self.peak_lr)


def parse_poolings(text: str) -> "list[PoolingChoice]":
    """``"cls,abmilp:depth=2:content=all"`` to its entries; ValueError shows what is wrong with one."""
    from mimkernels.nn.pooling_choice import parse_pooling

    return [parse_pooling(label) for label in dict.fromkeys(part.strip() for part in text.split(","))]
