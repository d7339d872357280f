"""The one source for the trainer's arguments: dataclass, command-line options, checks and the saved JSON."""

import argparse
import difflib
import json
import math
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

METHODS = ("mae",)
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")

# Of an image file. So many take up to 1.6 GB in the process that reads them.
MAX_PIXELS = 100_000_000

# A checkpoint made with another value of these cannot be continued at all ...
ARCHITECTURE_FIELDS = (
    "method", "model", "img_size", "in_chans", "patch_size", "model_kwargs",
    "decoder_dim", "decoder_depth", "decoder_heads",
)  # fmt: skip
# ... and with another value of these the stream of batches would be another one.
STREAM_FIELDS = ("data", "max_pixels", "pixel_range", "seed", "crop_scale", "hflip", "mask_ratio", "norm_pix_loss")


def setting(default: Any, help: str, group: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help, "group": group, **extra})


class Settings:
    """What every dataclass of settings can do."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> typing.Self:
        """Rebuild from saved values; names that are unknown and values of another type are refused by name."""
        known = {f.name: f.type for f in fields(cls)}
        for name, value in values.items():
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                raise ValueError(f"unknown setting {name!r}" + (f": did you mean {close[0]!r}?" if close else ""))
            if not is_of_type(value, known[name]):
                wanted = getattr(known[name], "__name__", None) or str(known[name])
                raise ValueError(f"setting {name!r} must be {wanted}, got {type(value).__name__} {str(value)[:60]!r}")
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> typing.Self:
        """From a file that ``to_json`` filled; ValueError names the file and what is wrong with it."""
        try:
            values = json.loads(Path(path).read_text())
            if not isinstance(values, dict):
                raise ValueError(f"expected an object, found {type(values).__name__}")
            return cls.from_dict(values)
        except ValueError as e:  # of JSON and of UTF-8 as well
            raise ValueError(f"{str(path)!r} does not hold settings: {e}") from e


@dataclass
class PretrainConfig(Settings):
    """Everything a pre-training run depends on. Saved as ``config.json`` in the run folder and in every checkpoint."""

    method: str = setting("mae", "pre-training method", "model", choices=METHODS)
    model: str = setting("vit_tiny_patch16_224", "encoder: any timm vit_* name", "model")
    img_size: int = setting(224, "image side in pixels", "model")
    in_chans: int = setting(3, "image channels: 3 (colour) or 1 (grey)", "model")
    patch_size: int | None = setting(None, "patch side in pixels (default: the model's own)", "model")
    model_kwargs: dict = field(
        default_factory=dict,
        metadata={"help": "further timm model arguments, such as embed_dim=128 depth=4", "group": "model"},
    )
    decoder_dim: int = setting(512, "decoder width", "model")
    decoder_depth: int = setting(8, "decoder blocks", "model")
    decoder_heads: int = setting(16, "decoder attention heads", "model")
    mask_ratio: float = setting(0.75, "share of patches removed", "model")
    norm_pix_loss: bool = setting(True, "normalise each target patch by its own mean and variance", "model")

    data: str = setting(
        "digits", "digits (embedded, no download), an image folder, or torchvision:NAME", "data", metavar="DATA"
    )
    data_root: str = setting("data", "where torchvision sets are kept or downloaded to", "data", metavar="DIR")
    max_pixels: int = setting(MAX_PIXELS, "refuse image files of more pixels, before they are decoded", "data")
    pixel_range: str = setting(
        "auto", "values that become black and white in grey images of more than 8 bits, with = if one is negative: "
        "--pixel-range=-1000,3000; auto: 0,65535 for integers, 0,1 for floating point", "data", metavar="LOW,HIGH",
    )  # fmt: skip
    crop_scale: float | None = setting(
        None, "smallest area of the random crop, 1 for none (default: 0.2; digits: 0.6)", "data"
    )
    hflip: bool | None = setting(
        None, "flip half of the images left to right (default: yes; digits and the like: no)", "data"
    )
    workers: int | None = setting(
        None, "data-loading processes per training process; 0 for none (default: by the cores)", "data"
    )

    batch_size: int = setting(64, "images per process and forward pass", "optimisation")
    accum_steps: int = setting(1, "forward passes per optimizer step", "optimisation")
    epochs: int = setting(100, "passes over the data", "optimisation")
    warmup_epochs: float | None = setting(
        None, "epochs of linear learning-rate warm-up (default: a twentieth of all)", "optimisation"
    )
    blr: float = setting(1.5e-4, "base learning rate: lr = blr * effective batch size / 256", "optimisation")
    lr: float | None = setting(None, "learning rate as it is, in place of --blr", "optimisation")
    min_lr: float = setting(0.0, "learning rate at the end of the cosine", "optimisation")
    weight_decay: float = setting(0.05, "weight decay (not on biases, norms and other 1-d parameters)", "optimisation")
    clip_grad: float | None = setting(None, "clip the gradient norm to this (default: no clipping)", "optimisation")
    seed: int = setting(0, "seed of weights, order, augmentation and masks", "optimisation")

    head_stats: str = setting(
        "",
        "statistics of the encoder's heads to record, such as entropy,distance,prefix_mass",
        "heads",
        metavar="NAMES",
    )
    head_stats_every: int = setting(100, "optimizer steps between records of --head-stats", "heads")
    regularize: dict = field(
        default_factory=dict,
        metadata={
            "help": "head statistics to add to the loss, such as entropy=1e-3 (a positive weight lowers the statistic)",
            "group": "heads",
        },
    )

    device: str = setting("auto", "where to train", "execution", choices=DEVICES)
    precision: str = setting(
        "auto", "auto takes bf16 where the device computes it fast", "execution", choices=PRECISIONS
    )
    compile: bool = setting(False, "torch.compile the model", "execution")

    output: str = setting("runs/pretrain", "run folder", "output", metavar="DIR")
    save_every: float = setting(10.0, "epochs between checkpoints", "output")
    keep_checkpoints: int = setting(2, "how many of them to keep, besides the final one", "output")
    log_every: int = setting(10, "optimizer steps between log entries", "output")
    pictures: int = setting(12, "reconstructed images in the report", "output")
    title: str = setting("", "title of the report (default: method, model and data)", "output")

    def check(self) -> None:
        """Raise ValueError for values that cannot work, before anything is written."""
        from mimkernels.train.pixels import Decoder

        for name in (
            "img_size",
            "decoder_dim",
            "decoder_depth",
            "decoder_heads",
            "batch_size",
            "accum_steps",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("epochs", "log_every", "keep_checkpoints", "head_stats_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("workers", "pictures", "seed"):
            value = getattr(self, name)
            require(value is None or value >= 0, name, value, "0 or more")
        if self.data == "torchvision:LSUN":  # the settings may be those of a file, and name a folder that came with it
            raise ValueError(
                "data 'torchvision:LSUN' is not opened: torchvision unpickles an index from its folder, which could "
                "run code; export its images to a folder"
            )
        require(self.method in METHODS, "method", self.method, f"one of {', '.join(METHODS)}")
        require(self.device in DEVICES, "device", self.device, f"one of {', '.join(DEVICES)}")
        require(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        require(self.in_chans in (1, 3), "in_chans", self.in_chans, "1 or 3")
        require(0 < self.mask_ratio < 1, "mask_ratio", self.mask_ratio, "between 0 and 1, both excluded")
        warmup = self.warmup_epochs
        require(warmup is None or 0 <= warmup <= self.epochs, "warmup_epochs", warmup, f"in 0..{self.epochs} (epochs)")
        for name in ("blr", "lr", "save_every"):
            value = getattr(self, name)
            require(value is None or (value > 0 and math.isfinite(value)), name, value, "positive and finite")
        for name in ("min_lr", "weight_decay"):
            value = getattr(self, name)
            require(value >= 0 and math.isfinite(value), name, value, "0 or more and finite")
        require(self.clip_grad is None or self.clip_grad > 0, "clip_grad", self.clip_grad, "positive")
        require(self.crop_scale is None or 0 < self.crop_scale <= 1, "crop_scale", self.crop_scale, "in (0, 1]")
        Decoder.from_settings(self.max_pixels, self.pixel_range)
        if self.patch_size is not None:
            require(self.patch_size >= 1, "patch_size", self.patch_size, "at least 1")
            if self.img_size % self.patch_size:
                raise ValueError(
                    f"img_size {self.img_size} is not divisible by patch_size {self.patch_size}: "
                    f"try --img-size {max(1, self.img_size // self.patch_size) * self.patch_size}"
                )
        if self.decoder_dim % self.decoder_heads:
            raise ValueError(f"decoder_dim {self.decoder_dim} is not divisible by decoder_heads {self.decoder_heads}")
        if self.decoder_dim % 4:
            raise ValueError(f"decoder_dim must be divisible by 4 (2-d sin-cos positions), got {self.decoder_dim}")


def require(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {wanted}, got {value}")


def add_arguments(parser: argparse.ArgumentParser, kind: type[Settings] = PretrainConfig) -> None:
    """One option per field. Defaults are left out of the namespace, so that it holds what the user gave and no more."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for f in fields(kind):
        meta = f.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        option = "--" + f.name.replace("_", "-")
        default = f.default if f.default is not MISSING else f.default_factory()
        scalar, optional = _scalar_type(f.type)
        text = meta["help"]
        if not optional and scalar is not dict and default != "":
            text += f" (default: {('yes' if default else 'no') if scalar is bool else default})"
        common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if scalar is dict:
            group.add_argument(option, nargs="+", type=_pair, metavar="NAME=VALUE", **common)
        elif scalar is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, **common)
        else:
            metavar = None if "choices" in meta else meta.get("metavar", {int: "N", float: "X", str: "NAME"}[scalar])
            group.add_argument(option, type=scalar, choices=meta.get("choices"), metavar=metavar, **common)


def given_arguments(args: argparse.Namespace, kind: type[Settings] = PretrainConfig) -> dict[str, Any]:
    """The settings that were given on the command line."""
    given = {f.name: getattr(args, f.name) for f in fields(kind) if hasattr(args, f.name)}
    return {name: dict(value) if isinstance(value, list) else value for name, value in given.items()}


def is_of_type(value: Any, annotation: Any) -> bool:
    """Whether a value read from a file is what a field of a dataclass is annotated with; an int is also a float."""
    kind, optional = _scalar_type(annotation)
    kind, items = typing.get_origin(kind) or kind, typing.get_args(kind)
    if value is None:
        return optional
    if isinstance(value, bool):
        return kind is bool
    if not isinstance(value, (int, float) if kind is float else kind):
        return False
    return kind is not list or not items or all(is_of_type(item, items[0]) for item in value)


def _scalar_type(annotation: Any) -> tuple[type, bool]:
    if isinstance(annotation, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return kinds[0], True
    return annotation, False


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def changes(saved: PretrainConfig, now: PretrainConfig, names: typing.Iterable[str]) -> list[str]:
    """``name: saved -> now`` for each named setting that differs."""
    return [
        f"{name}: {getattr(saved, name)!r} -> {getattr(now, name)!r}"
        for name in names
        if getattr(saved, name) != getattr(now, name)
    ]
