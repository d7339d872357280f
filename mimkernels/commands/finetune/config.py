"""Settings of a fine-tuning run."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from mimkernels.commands.finetune.method import Finetune
from mimkernels.engine.settings import require, setting
from mimkernels.engine.training.config import TrainingConfig, shared
from mimkernels.engine.training.mixing import check_pairs

# As of `TrainingConfig.architecture`, ...
_ARCHITECTURE = (
    "model", "from_scratch", "pretrained", "arch", "model_kwargs", "img_size", "in_chans", "patch_size", "num_classes",
    "readout", "head_std", "freeze", "ema",
)  # fmt: skip
# ... and of `results`.
_RESULTS = (
    "data", "val_data", "val_share", "labels", "max_pixels", "pixel_range", "pixel_stats", "seed", "crop_scale",
    "hflip", "test_crop", "auto_augment", "erasing", "mixup", "cutmix", "label_smoothing", "drop_path", "layer_decay",
    "batch_size", "accum_steps", "epochs", "warmup_epochs", "blr", "lr", "min_lr", "min_blr", "warmup_blr",
    "schedule", "step_epoch", "beta2", "weight_decay", "clip_grad", "precision", "regularize",
)  # fmt: skip

SMALL = 5000  # labelled images below which the defaults are others
_FEW_STEPS = 500  # of the optimizer, fewer than which the defaults do not train


@dataclass
class FinetuneConfig(TrainingConfig):
    """Everything a fine-tuning run depends on. Saved as ``config.json`` in the run folder and in every checkpoint.

    What is left to the model and to the data is filled in when both are known; the saved settings are complete.
    """

    methods: ClassVar = {"finetune": Finetune}
    architecture: ClassVar = _ARCHITECTURE
    results: ClassVar = _RESULTS
    by_default: ClassVar = ("img_size", "batch_size", "epochs", "val_images")

    method: str = setting("finetune", "", "model", hidden=True)
    model: str = setting(
        "", "what to start from: a run folder or checkpoint of `mimkernels pretrain`, a published checkpoint (with "
        "--arch where it is of Swin or BEiT), or a timm name", "model", metavar="MODEL",
    )  # fmt: skip
    arch: str | None = setting(
        None, "timm name of a published checkpoint's encoder (default: by the shapes of its weights)", "model"
    )
    model_kwargs: dict = field(
        default_factory=dict,
        metadata={"help": "timm model arguments that differ from what --model says, such as window_size=7",
                  "group": "model"},
    )  # fmt: skip
    pretrained: bool = setting(True, "load the published weights of a timm name", "model")
    from_scratch: bool = setting(
        False, "take the architecture alone and begin with random weights, to compare with", "model"
    )
    img_size: int = setting(0, "image side in pixels; 0: that of --model", "model")
    in_chans: int = setting(3, "", "model", hidden=True)
    patch_size: int | None = setting(None, "", "model", hidden=True)
    num_classes: int | None = setting(None, "", "model", hidden=True)

    readout: str = setting(
        "mean", "what the classifier reads: mean (of patches, with a norm of its own, as published), cls, or a pooling "
        "of `mimkernels probe --list`, such as abmilp:depth=2", "fine-tuning", metavar="NAME",
    )  # fmt: skip
    head_std: float | None = setting(
        None, f"standard deviation of the classifier's first weights (default: 0.02; from {SMALL:,} labels on 2e-5 "
        "behind a pre-trained ViT or BEiT, as published)", "fine-tuning",
    )  # fmt: skip
    layer_decay: float | None = setting(
        None, "each layer learns at this share of the rate of the layer above it (default: 0.75; 1 with "
        "--from-scratch)", "fine-tuning",
    )  # fmt: skip
    freeze: int = setting(0, "leave patches, positions and so many blocks as they are", "fine-tuning")
    drop_path: float = setting(0.1, "stochastic depth of the last block; those before have less", "fine-tuning")
    label_smoothing: float = setting(0.1, "share of each target that is spread over all classes", "fine-tuning")
    mixup: float | None = setting(
        None, f"mix pairs of images by a share from Beta(X, X); 0 for none (default: 0.8 from {SMALL:,} labels on)",
        "fine-tuning",
    )  # fmt: skip
    cutmix: float | None = setting(
        None, f"paste a part of an image into another one; 0 for none (default: 1 from {SMALL:,} labels on)",
        "fine-tuning",
    )  # fmt: skip
    auto_augment: str | None = setting(
        None, "RandAugment as timm names it, or none (default: rand-m9-mstd0.5-inc1 from that many labels on, but for "
        "digits and fashion-mnist)", "fine-tuning",
    )  # fmt: skip
    erasing: float | None = setting(
        None, "share of images of which a rectangle is replaced by noise (default: 0.25 with RandAugment, else 0)",
        "fine-tuning",
    )  # fmt: skip
    ema: float = setting(
        0.0, "decay of a moving average of the weights, such as 0.9999, which is then tested and saved; 0 for none",
        "fine-tuning",
    )  # fmt: skip

    data: str = setting("digits", "digits (embedded), fashion-mnist, a folder of class folders, or a folder with train "
                        "and val folders of them, or torchvision:NAME", "data", metavar="DATA")  # fmt: skip
    data_root: str = shared("data_root")
    labels: str = setting(
        "all", "training images to use, equally many of each class, chosen by the seed: 1%%, 10%%, any share; 25, so "
        "many of each class; all", "data", metavar="SHARE|N|all",
    )  # fmt: skip
    val_data: str | None = setting(
        None, "folder of class folders to test on (default: the data's own, or held out)", "data", metavar="DIR"
    )
    val_share: float = setting(0.2, "share of every class held out for the test where the data has no split", "data")
    val_every: float | None = shared("val_every")
    val_images: int = setting(
        0, "most images to test on while it trains, spread over those there are; 0: 10,000. The last test is on all",
        "data",
    )  # fmt: skip
    val_masks: int = setting(1, "", "data", hidden=True)
    max_pixels: int = shared("max_pixels")
    pixel_range: str = shared("pixel_range")
    pixel_stats: str = setting("auto", "", "data", hidden=True)  # those of the encoder
    test_crop: float = setting(1.0, "share of the central square's side that is tested on (published: 0.875)", "data")
    crop_scale: float | None = setting(
        None, "smallest area of the random crop, 1 for none (default: 0.2; digits, fashion-mnist 0.6; published: 0.08)",
        "data",
    )  # fmt: skip
    hflip: bool | None = shared("hflip")
    workers: int | None = shared("workers")

    batch_size: int = setting(
        0, "images per process and forward pass; 0: 64, a quarter of fewer than 256", "optimisation"
    )
    accum_steps: int = shared("accum_steps")
    epochs: int = setting(
        0, f"passes over the data; 0: 50, below {SMALL:,} labels 20, and {_FEW_STEPS} steps at least", "optimisation"
    )
    warmup_epochs: float | None = setting(
        None, "epochs of linear learning-rate warm-up (default: a tenth of all)", "optimisation"
    )
    blr: float | None = setting(
        None, "base learning rate: lr = blr * effective batch size / 256 (default: 1e-3)", "optimisation"
    )
    lr: float | None = shared("lr")
    min_lr: float = shared("min_lr", 1e-6)
    min_blr: float | None = shared("min_blr")
    warmup_blr: float = shared("warmup_blr")
    schedule: str = shared("schedule")
    step_epoch: float | None = shared("step_epoch")
    beta2: float | None = setting(None, "decay of AdamW's mean of squared gradients (default: 0.999)", "optimisation")
    weight_decay: float | None = setting(
        None, "weight decay, not on biases, norms, positions and the like (default: 0.05)", "optimisation"
    )
    clip_grad: float | None = setting(None, "clip the gradient norm to this (default: no clipping)", "optimisation")
    seed: int = setting(0, "seed of the labels' choice, weights, order and augmentation", "optimisation")

    head_stats: str = shared("head_stats")
    head_stats_every: int = shared("head_stats_every")
    analyze_every: float = setting(
        0.0, "epochs between records of what the heads do on 64 images, the same every time; 0: before and after alone",
        "heads",
    )  # fmt: skip
    regularize: dict = shared("regularize")  # noqa: RUF009 # a field

    device: str = shared("device")
    precision: str = shared("precision")
    compile: bool = shared("compile")

    output: str = shared("output", "runs/finetune")
    save_every: float = shared("save_every")
    keep_checkpoints: int = shared("keep_checkpoints")
    log_every: int = shared("log_every")
    pictures: int = setting(24, "mistakes shown in the report, those that the model was surest of", "output")
    title: str = setting("", "title of the report (default: model and data)", "output")

    @classmethod
    def continued(cls, saved: dict[str, Any], given: dict[str, Any]) -> Self:
        """As the parent's; saved arguments of the model are complete, and given ones are some of them."""
        if not saved:
            return super().continued(saved, given)
        arguments = {**saved.get("model_kwargs", {}), **given.get("model_kwargs", {})}
        own = {name: arguments.pop(name) for name in ("patch_size", "in_chans") if name in arguments}  # as load_source
        return super().continued(saved, {**given, "model_kwargs": arguments, **own})

    def completed(self, saved: dict[str, Any]) -> Self:
        """These settings with what they leave open as a run has it that is continued."""
        values = self.to_dict()
        for f in fields(self):
            value, hidden = values[f.name], f.metadata.get("hidden", False)
            if f.name in saved and (value is None or hidden or (value == 0 and f.name in self.by_default)):
                values[f.name] = saved[f.name]
        # A timm name without weights begins from scratch without being told to.
        values["from_scratch"] = values["from_scratch"] or saved.get("from_scratch", False)
        return self.continued(saved, values)

    def check(self) -> None:
        """Raise ValueError for values that cannot work, before anything is read or written."""
        super().check()
        if not self.model and self.arch is None:
            raise ValueError("model is missing: --model takes a run folder, a checkpoint or a timm name")
        decay = self.layer_decay
        require(decay is None or 0 < decay <= 1, "layer_decay", decay, "in (0, 1]")
        std = self.head_std
        require(std is None or 0 < std < math.inf, "head_std", std, "a number above 0")
        require(self.freeze >= 0, "freeze", self.freeze, "0 or more")
        for name in ("drop_path", "ema"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        require(self.erasing is None or 0 <= self.erasing <= 1, "erasing", self.erasing, "in [0, 1]")
        require(0 < self.val_share < 1, "val_share", self.val_share, "between 0 and 1, both excluded")
        require(0 < self.test_crop <= 1, "test_crop", self.test_crop, "in (0, 1]")
        parse_labels(self.labels)
        check_pairs(self.mixup or 0.0, self.cutmix or 0.0, self.batch_size)

    def filled(self, images: int, classes: int, held_out: int, in_memory: bool) -> dict[str, Any]:
        """The settings that are left open, for so many labelled images to train on.

        Below ``SMALL`` of them little is changed about the images and training is short; from there on the recipe is
        that of MAE's ViT-L.
        """
        large = images >= SMALL
        augment = self.auto_augment or ("rand-m9-mstd0.5-inc1" if large and not in_memory else "none")
        # Even, for pairs to be mixed.
        batch_size = self.batch_size or max(2, min(64, images // 4 // 2 * 2))
        least = math.ceil(_FEW_STEPS / max(1, images // (batch_size * self.accum_steps)))
        epochs = self.epochs or max(50 if large else 20, least)
        near_zero = large and not self.from_scratch and not (self.arch or "").startswith("swin")
        return {
            "num_classes": classes,
            "head_std": (2e-5 if near_zero else 0.02) if self.head_std is None else self.head_std,
            "epochs": epochs,
            "batch_size": batch_size,
            "layer_decay": (1.0 if self.from_scratch else 0.75) if self.layer_decay is None else self.layer_decay,
            "mixup": (0.8 if large else 0.0) if self.mixup is None else self.mixup,
            "cutmix": (1.0 if large else 0.0) if self.cutmix is None else self.cutmix,
            "auto_augment": augment,
            "erasing": (0.25 if augment != "none" else 0.0) if self.erasing is None else self.erasing,
            "val_images": min(self.val_images or 10_000, held_out),
            "analyze_every": self.analyze_every or float(epochs),
        }


def parse_labels(text: str) -> tuple[float | None, int | None]:
    """``--labels``: a share of all images, or a number of each class; neither for all of them."""
    if text == "all":
        return None, None
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if 0 < share <= 1:
                return share, None
        elif int(text) >= 1:
            return None, int(text)
    except ValueError:
        pass
    raise ValueError(f"labels must be all, a share such as 1% or a number of each class such as 25, got {text!r}")
