"""Models from the settings of a run: what a checkpoint or a ``config.json`` says is enough to build its model anew."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mimkernels.models.base import ImageModel
from mimkernels.models.dino import DINO
from mimkernels.models.finetuned import Finetuned
from mimkernels.models.mae import MAE
from mimkernels.models.mocov3 import MoCoV3
from mimkernels.models.simmim import SimMIM
from mimkernels.models.supervised import Supervised

__all__ = [
    "METHODS", "PIXEL_STATISTICS", "build_model", "encoder_name", "format_statistics", "parse_statistics",
    "pixel_statistics",
]  # fmt: skip

# Mean and deviation of ImageNet's pixels in [0, 1], by the number of channels: colour, and its luminance.
PIXEL_STATISTICS = {
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    1: ((0.449,), (0.226,)),
}

_Kinds = Mapping[str, tuple[type, ...]]

# What every model is built from, and what each setting may be; an int is also a float.
_SETTINGS: _Kinds = {
    "method": (str,), "model": (str,), "model_kwargs": (dict,), "img_size": (int,), "in_chans": (int,),
    "patch_size": (int, type(None)),
}  # fmt: skip
_MASK_RATIO: _Kinds = {"mask_ratio": (float, type(None))}
_TARGET: _Kinds = {"target": (str,), "target_dim": (int, list, type(None))}
# Of settings that runs before them have not.
_LATER: dict[str, Any] = {"target": "pixels", "target_dim": None, "head_std": 0.02}


class Recipe(NamedTuple):
    """How a method's model is built.

    Attributes:
        model: its class, with ``from_config``.
        settings: those that are the method's own, each an argument of the class, and what each may be.
        name: the setting that holds the encoder's timm name.
    """

    model: type[ImageModel]
    settings: _Kinds
    name: str = "model"


METHODS = {
    "mae": Recipe(
        MAE,
        {
            **_MASK_RATIO,
            **_TARGET,
            "decoder_dim": (int,),
            "decoder_depth": (int,),
            "decoder_heads": (int,),
            "norm_pix_loss": (bool,),
        },
    ),
    "simmim": Recipe(SimMIM, {**_MASK_RATIO, **_TARGET, "mask_unit": (int, type(None)), "loss": (str,)}),
    "supervised": Recipe(Supervised, {"num_classes": (int,), "label_smoothing": (float,)}),
    "finetune": Recipe(
        Finetuned,
        {"num_classes": (int,), "label_smoothing": (float,), "readout": (str,), "head_std": (float,), "ema": (float,)},
        name="arch",
    ),
    "mocov3": Recipe(
        MoCoV3,
        {
            "temperature": (float,),
            "mlp_dim": (int, type(None)),
            "out_dim": (int,),
            "stop_grad_conv1": (bool,),
            "sincos_positions": (bool,),
        },
    ),
    "dino": Recipe(
        DINO,
        {
            "prototypes": (int,),
            "mlp_dim": (int, type(None)),
            "bottleneck_dim": (int,),
            "student_temp": (float,),
            "teacher_temp": (float,),
        },
    ),
}


def build_model(settings: Mapping[str, Any]) -> Any:
    """A freshly initialised model by the settings of a run. The caller sets the seed.

    The settings may be those of a file that nobody vouches for: nothing is opened, and of timm's arguments only those
    of the architecture are passed on (``check_architecture``).

    Args:
        settings: ``method``, ``model`` (a plain timm name), ``model_kwargs`` (its further arguments), ``img_size``,
            ``in_chans``, ``patch_size``, perhaps ``pixel_stats``, and what else the method has, such as ``mask_ratio``
            (None, as of all of them: its own) and ``decoder_dim``; others do not concern the model.

    Returns:
        An ``ImageModel`` of the method's class.

    Raises:
        ValueError: a setting is missing, of another type, or does not fit the model; names it.
    """
    settings = {**_LATER, **settings}
    _check_kinds(settings, _SETTINGS)
    recipe = METHODS.get(settings["method"])
    if recipe is None:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {settings['method']!r}")
    _check_kinds(settings, recipe.settings)
    if settings["in_chans"] not in PIXEL_STATISTICS:
        raise ValueError(f"in_chans must be 1 or 3, got {settings['in_chans']}")
    stats = settings.get("pixel_stats", "imagenet")  # of a run before there was the setting: these
    if not isinstance(stats, str):
        raise ValueError(f"setting 'pixel_stats' must be str, got {type(stats).__name__} {str(stats)[:60]!r}")
    mean, std = pixel_statistics(stats, settings["in_chans"])
    names = ("img_size", "in_chans", "patch_size", *recipe.settings)
    arguments = {**{name: settings[name] for name in names}, "mean": mean, "std": std}
    repeated = sorted({"name", *arguments}.intersection(settings["model_kwargs"]))
    if repeated:
        raise ValueError(f"model_kwargs repeats {', '.join(repeated)}, which is given by an option of its own")
    for name in recipe.settings:
        if arguments[name] is None:  # the model's own
            del arguments[name]
    _check_kinds(settings, {recipe.name: (str,)})
    return recipe.model.from_config({"name": settings[recipe.name], **arguments, **settings["model_kwargs"]})


def encoder_name(settings: Mapping[str, Any]) -> str:
    """The timm name of the encoder that ``build_model`` builds by these settings."""
    name: str = settings[METHODS[settings["method"]].name]
    return name


def format_statistics(mean: Sequence[float], std: Sequence[float]) -> str:
    """``0.4850,0.4560,0.4060/0.2290,0.2240,0.2250``, as settings keep them."""
    return "/".join(",".join(f"{value:.4f}" for value in values) for values in (mean, std))


def pixel_statistics(stats: str, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel by the setting ``pixel_stats``; of "auto", too, those of ImageNet."""
    return PIXEL_STATISTICS[in_chans] if stats in ("imagenet", "auto") else parse_statistics(stats, in_chans)


def parse_statistics(text: str, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel; ValueError shows what is wrong."""
    try:
        mean, std = (tuple(float(value) for value in part.split(",")) for part in text.split("/"))
        if not len(mean) == len(std) == in_chans or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
            raise ValueError
    except ValueError:
        wanted = "MEAN/STD" if in_chans == 1 else "MEAN,MEAN,MEAN/STD,STD,STD"
        raise ValueError(
            f"pixel_stats must be auto, imagenet, data or, for in_chans {in_chans}, {wanted} with positive deviations, "
            f"got {text!r}"
        ) from None
    return mean, std


def _check_kinds(settings: Mapping[str, Any], wanted: _Kinds) -> None:
    for name, kinds in wanted.items():
        if name not in settings:
            raise ValueError(f"setting {name!r} is missing")
        if not _is_of(settings[name], kinds):
            names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            value = settings[name]
            raise ValueError(f"setting {name!r} must be {names}, got {type(value).__name__} {str(value)[:60]!r}")


def _is_of(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)
