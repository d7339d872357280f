"""What the training loop reads of the settings of a command that trains by it, and what it asks of them."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, field
from typing import Any, ClassVar, Self

from mimkernels.data import MAX_PIXELS
from mimkernels.engine.settings import DEVICES, PRECISIONS, Settings, require, require_seed, setting
from mimkernels.engine.training.method import Method

SCHEDULES = ("cosine", "step")
UNREAD = {"cosine": ("step_epoch",), "step": ("min_lr", "min_blr")}  # settings that a schedule has no use for

# Settings that mean the same in every command that trains.
_SHARED: dict[str, Any] = {
    "data_root": setting(
        "data",
        "where fashion-mnist is looked for, and torchvision sets are kept or downloaded to",
        "data",
        metavar="DIR",
    ),
    "val_every": setting(
        None, "epochs between validations; 0: at the end alone (default: a twentieth of all, at least 1)", "data"
    ),
    "max_pixels": setting(MAX_PIXELS, "refuse image files of more pixels, before they are decoded", "data"),
    "pixel_range": setting(
        "auto",
        "values that become black and white in grey images of more than 8 bits, with = if one is negative: "
        "--pixel-range=-1000,3000; auto: 0,65535 for integers, 0,1 for floating point",
        "data",
        metavar="LOW,HIGH",
    ),
    "hflip": setting(None, "flip half of the images left to right (default: yes; digits and the like: no)", "data"),
    "workers": setting(None, "data-loading processes per training process; 0 for none (default: by the cores)", "data"),
    "accum_steps": setting(1, "forward passes per optimizer step", "optimisation"),
    "lr": setting(None, "learning rate as it is, in place of --blr", "optimisation"),
    "min_lr": setting(0.0, "learning rate at the end of the cosine", "optimisation"),
    "min_blr": setting(None, "the same for 256 images, in place of --min-lr", "optimisation"),
    "warmup_blr": setting(0.0, "learning rate for 256 images at which warm-up begins", "optimisation"),
    "schedule": setting(
        "cosine",
        "after warm-up, half a cosine, or a tenth of the rate from --step-epoch on",
        "optimisation",
        choices=SCHEDULES,
    ),
    "step_epoch": setting(
        None, "epoch at which --schedule step takes its step (default: after seven eighths)", "optimisation"
    ),
    "head_stats": setting(
        "",
        "statistics of the encoder's heads to record, such as entropy,distance,prefix_mass",
        "heads",
        metavar="NAMES",
    ),
    "head_stats_every": setting(100, "optimizer steps between records of --head-stats", "heads"),
    "regularize": field(
        default_factory=dict,
        metadata={
            "help": "head statistics to add to the loss, such as entropy=1e-3 (a positive weight lowers the statistic)",
            "group": "heads",
        },
    ),
    "device": setting("auto", "where to train", "execution", choices=DEVICES),
    "precision": setting("auto", "auto takes bf16 where the device computes it fast", "execution", choices=PRECISIONS),
    "compile": setting(False, "torch.compile the model", "execution"),
    "output": setting("runs/pretrain", "run folder", "output", metavar="DIR", short="-o"),
    "save_every": setting(10.0, "epochs between checkpoints", "output"),
    "keep_checkpoints": setting(2, "how many of them to keep, besides the final one", "output"),
    "log_every": setting(10, "optimizer steps between log entries", "output"),
}


def shared(name: str, default: Any = MISSING) -> Any:
    """A setting that means the same in every command that trains, perhaps with another default."""
    kept = _SHARED[name]
    if kept.default_factory is not MISSING:
        return field(default_factory=kept.default_factory, metadata=kept.metadata)
    return field(default=kept.default if default is MISSING else default, metadata=kept.metadata)


class TrainingConfig(Settings):
    """Base of the settings of a training run; a subclass is a dataclass with these fields and others.

    Attributes:
        methods: what ``method`` may be.
        architecture: a checkpoint made with another value of these cannot be continued at all.
        results: what changes the numbers of a continued run; a person is told.
        by_default: settings of which 0 means a value that the model or the data tells.
    """

    methods: ClassVar[Mapping[str, type[Method]]]
    architecture: ClassVar[tuple[str, ...]]
    results: ClassVar[tuple[str, ...]]
    by_default: ClassVar[tuple[str, ...]] = ()

    method: str
    img_size: int
    in_chans: int
    num_classes: int | None
    data: str
    data_root: str
    max_pixels: int
    pixel_range: str
    pixel_stats: str
    val_every: float | None
    val_images: int
    val_masks: int
    crop_scale: float | None
    hflip: bool | None
    label_smoothing: float
    mixup: float | None
    cutmix: float | None
    workers: int | None
    batch_size: int
    accum_steps: int
    epochs: int
    warmup_epochs: float | None
    blr: float | None
    lr: float | None
    min_lr: float
    min_blr: float | None
    warmup_blr: float
    schedule: str
    step_epoch: float | None
    beta2: float | None
    weight_decay: float | None
    clip_grad: float | None
    seed: int
    head_stats: str
    head_stats_every: int
    analyze_every: float
    regularize: dict
    device: str
    precision: str
    compile: bool
    output: str
    save_every: float
    keep_checkpoints: int
    log_every: int
    pictures: int
    title: str

    @property
    def the_method(self) -> type[Method]:
        return self.methods[self.method]

    def value(self, name: str) -> Any:
        """The setting `name`, or the method's own value where it is None."""
        given = getattr(self, name)
        return getattr(self.the_method, name) if given is None else given

    @classmethod
    def continued(cls, saved: dict[str, Any], given: dict[str, Any]) -> Self:
        """Settings of a run that goes on: what is `given` over what was `saved`, if there is anything.

        Raises:
            ValueError: another method is given; options of either would be refused one by one.
        """
        before, now = saved.get("method"), given.get("method")
        if before is not None and now not in (None, before):
            raise ValueError(
                f"the checkpoint is of method {before!r}, {now!r} was asked for: leave --method out, or start a new run"
            )
        return cls.from_dict({**saved, **given})

    def check(self) -> None:
        """Raise ValueError for values that cannot work, before anything is written."""
        from mimkernels.data.pixels import Decoder

        for name in (
            "img_size", "batch_size", "accum_steps", "epochs", "log_every", "keep_checkpoints", "head_stats_every",
            "val_images", "val_masks",
        ):  # fmt: skip
            value, open_ = getattr(self, name), name in self.by_default
            require(value >= 1 or (open_ and value == 0), name, value, f"at least 1{', or 0' if open_ else ''}")
        require_seed(self.seed)
        for name in ("workers", "pictures"):
            value = getattr(self, name)
            require(value is None or value >= 0, name, value, "0 or more")
        if self.data == "torchvision:LSUN":  # the settings may be those of a file, and name a folder that came with it
            raise ValueError(
                "data 'torchvision:LSUN' is not opened: torchvision unpickles an index from its folder, which could "
                "run code; export its images to a folder"
            )
        require(self.method in self.methods, "method", self.method, f"one of {', '.join(self.methods)}")
        require(self.device in DEVICES, "device", self.device, f"one of {', '.join(DEVICES)}")
        require(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        require(self.in_chans in (1, 3), "in_chans", self.in_chans, "1 or 3")
        require(self.schedule in SCHEDULES, "schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        for name in ("step_epoch", "warmup_epochs"):
            value, epochs = getattr(self, name), self.epochs or math.inf
            require(value is None or 0 <= value <= epochs, name, value, f"in 0..{epochs} (epochs)")
        require(self.beta2 is None or 0 <= self.beta2 < 1, "beta2", self.beta2, "at least 0 and below 1")
        classes = self.num_classes
        require(classes is None or classes >= 2, "num_classes", classes, "at least 2")
        for name in ("blr", "lr", "save_every"):
            value = getattr(self, name)
            require(value is None or (value > 0 and math.isfinite(value)), name, value, "positive and finite")
        for name in (
            "min_lr", "min_blr", "warmup_blr", "weight_decay", "val_every", "analyze_every", "mixup", "cutmix",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value is None or (value >= 0 and math.isfinite(value)), name, value, "0 or more and finite")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, "label_smoothing", smoothing, "at least 0 and below 1")
        require(self.clip_grad is None or self.clip_grad > 0, "clip_grad", self.clip_grad, "positive")
        require(self.crop_scale is None or 0 < self.crop_scale <= 1, "crop_scale", self.crop_scale, "in (0, 1]")
        Decoder.from_settings(self.max_pixels, self.pixel_range)
