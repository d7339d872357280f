"""What a model predicts: pixels, themselves or normalised by their patch or neighbourhood, or a teacher's features."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from mimkernels._options import option_value
from mimkernels.models.architecture import ARCHITECTURE_ARGUMENTS, check_sizes
from mimkernels.ops import masked_feature_loss

__all__ = ["FeatureTarget", "Target", "parse_target"]

_LOCAL = re.compile(r"local-norm:(\d+)")
_OPTION = re.compile(r"[a-z_]+=[^/]*$")  # a slash is of a path
_COMMA = re.compile(r",(?![^\[]*\])")  # between options, not within a list
_CHOICES = {
    "norm": ("ln", "instance", "none"),
    "loss": ("smooth-l1", "mse", "l1", "cosine"),
    "tokens": ("masked", "all"),
    "part": ("block", "mlp"),
}


class FeatureTarget(NamedTuple):
    """Features of a teacher that see the whole image.

    Attributes:
        model: a timm name, run folder or checkpoint; None is the moving average of the encoder that is trained.
        layer: the block whose output they are; -1 is what the encoder gives, after its last norm.
        layers: the mean of so many blocks (where there are fewer, of all), the last one that of `layer`, each
            normalised by LayerNorm without gain; None takes the output of one as it is.
        part: "block", the tokens behind it, or "mlp", what its MLP adds to them.
        norm: "ln", LayerNorm without gain of every token; "instance", every feature over the tokens of an image;
            "none".
        loss: "smooth-l1", "mse", "l1" or "cosine".
        beta: where smooth L1 turns from square to linear.
        tokens: those that are compared, "masked" or "all".
        arch, model_kwargs: timm name of a published checkpoint's encoder, and arguments of the timm model.
        pretrained: load the published weights of a timm name.
        img_size: side of the images that the teacher sees, in pixels; None: by the model.
    """

    model: str | None
    layer: int = -1
    layers: int | None = None
    part: str = "block"
    norm: str = "ln"
    loss: str = "smooth-l1"
    beta: float = 1.0
    tokens: str = "masked"
    arch: str | None = None
    model_kwargs: Mapping[str, Any] = MappingProxyType({})
    pretrained: bool = True
    img_size: int | None = None

    def compare(self, pred: Tensor, features: Tensor, ids: Tensor | None) -> Tensor:
        """The mean loss of ``pred``, as ``masked_feature_loss`` takes it."""
        norm = "ln" if self.norm == "ln" else "none"
        kind = self.loss.replace("-", "_")
        return masked_feature_loss(pred, features, ids, norm=norm, kind=kind, beta=self.beta)


class Target(NamedTuple):
    """A target as the loss takes it.

    Attributes:
        norm_pix: normalise by each patch's own mean and deviation.
        local_norm: normalise by the mean and deviation in a box of this side around each pixel; None for neither.
        features: a teacher's features take the place of pixels.
    """

    norm_pix: bool = False
    local_norm: int | None = None
    features: FeatureTarget | None = None


def parse_target(text: str) -> Target:
    """``"pixels"``, ``"patch-norm"``, ``"local-norm:K"``, K odd and at least 3, ``"features:MODEL"`` or ``"ema"``.

    The last two may be followed by a colon and options of ``FeatureTarget``: ``"features:runs/mae:layer=8,norm=ln"``.

    Raises:
        ValueError: anything else.
    """
    if text == "pixels":
        return Target()
    if text == "patch-norm":
        return Target(norm_pix=True)
    match = _LOCAL.fullmatch(text) if isinstance(text, str) else None
    if match is not None and int(match[1]) % 2 and int(match[1]) >= 3:
        return Target(local_norm=int(match[1]))
    kind, _, rest = text.partition(":") if isinstance(text, str) else ("", "", "")
    if kind == "ema":
        return Target(
            features=FeatureTarget(None, **{"layers": 10, "part": "mlp", **_options(rest, text, _OF_FEATURES)})
        )
    if kind == "features":
        model, _, options = rest.rpartition(":")  # a name may have a colon, too, as hf-hub:NAME
        if not model or not _OPTION.match(options):
            model, options = rest, ""
        if model:
            return Target(features=FeatureTarget(model, **_options(options, text, (*_OF_FEATURES, *_OF_MODELS))))
    raise ValueError(
        f"target must be pixels, patch-norm, local-norm:K with an odd number of pixels K of at least 3 (published: "
        f"local-norm:47), features:MODEL or ema, the last two perhaps with options (features:MODEL:layer=-1,norm=ln), "
        f"got {text!r}"
    )


# Options of a teacher's features, and those of a teacher that is named.
_OF_FEATURES = ("layer", "layers", "beta", *_CHOICES)
_OF_MODELS = ("arch", "pretrained", "img_size", *sorted(ARCHITECTURE_ARGUMENTS - {"img_size", "num_classes"}))


def _options(given: str, text: str, known: tuple[str, ...]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    for part in _COMMA.split(given) if given else []:
        name, _, value = part.partition("=")
        try:
            if name not in known:
                raise ValueError
            if name in ("layer", "layers", "img_size"):
                options[name] = int(value)
            elif name == "beta":
                options[name] = float(value)
            elif name == "pretrained":
                options[name] = {"true": True, "false": False}[value]
            elif name == "arch":
                options[name] = value
            elif name not in _CHOICES:
                arguments[name] = option_value(value)
            elif value in _CHOICES[name]:
                options[name] = value
            else:
                raise ValueError
        except (ValueError, KeyError):
            choices = ", ".join(f"{key}={'|'.join(values)}" for key, values in _CHOICES.items())
            of_models = ", arch=NAME, pretrained=true|false, img_size=NUMBER, or an argument of the timm model"
            raise ValueError(
                f"target {text!r}: an option must be layer=NUMBER, layers=NUMBER, beta=NUMBER, {choices}"
                f"{of_models if 'arch' in known else ''}, got {part!r}"
            ) from None
    if options.get("layers", 1) < 1 or not 0 < options.get("beta", 1.0) < float("inf"):
        raise ValueError(f"target {text!r}: layers must be at least 1 and beta positive")
    if options.get("img_size", 1) < 1:
        raise ValueError(f"target {text!r}: img_size must be at least 1, got {options['img_size']}")
    check_sizes(arguments)
    return {**options, **({"model_kwargs": arguments} if arguments else {})}
