"""What the training loop reads of the settings of a command that trains by it, and what it asks of them."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from mimkernels.commands.pretrain.methods import Method
from mimkernels.engine.settings import DEVICES, PRECISIONS, Settings, require

SCHEDULES = ("cosine", "step")


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
        """Settings of a run that goes on: what is `given` over what was `saved`."""
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
        for name in ("workers", "pictures", "seed"):
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
        for name in ("min_lr", "min_blr", "warmup_blr", "weight_decay", "val_every", "analyze_every"):
            value = getattr(self, name)
            require(value is None or (value >= 0 and math.isfinite(value)), name, value, "0 or more and finite")
        require(self.clip_grad is None or self.clip_grad > 0, "clip_grad", self.clip_grad, "positive")
        require(self.crop_scale is None or 0 < self.crop_scale <= 1, "crop_scale", self.crop_scale, "in (0, 1]")
        Decoder.from_settings(self.max_pixels, self.pixel_range)
