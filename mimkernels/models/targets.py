"""What a model predicts: pixels, themselves or normalised by their patch or neighbourhood, or a teacher's features.

Or a weighted sum of these, each with a head of its own.
"""

import math
import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from mimkernels._options import option_value
from mimkernels.models.architecture import ARCHITECTURE_ARGUMENTS, check_sizes
from mimkernels.ops import masked_feature_loss

__all__ = ["FeatureTarget", "Target", "Term", "parse_target", "parse_targets", "split_targets"]

_LOCAL = re.compile(r"local-norm:(\d+)")
_OPTION = re.compile(r"[a-z_]+=[^/]*$")  # a slash is of a path
_COMMA = re.compile(r",(?![^\[]*\])")  # between options, not within a list
_PLUS = re.compile(r"\s+\+\s+")  # between the targets of a sum
_WEIGHT = re.compile(r"([-+.\d][^\s*:]*)\s*\*\s*(.*)", re.DOTALL)
_MOST = 8  # targets of a sum: a file shall not keep a machine busy
_CHOICES = {
    "norm": ("ln", "instance", "none"),
    "loss": ("smooth-l1", "mse", "l1", "cosine"),
    "tokens": ("masked", "all"),
    "part": ("block", "mlp"),
}


class FeatureTarget(NamedTuple):
    """Features of a teacher that see the whole image.

    Attributes:
        model: a timm name, run folder or checkpoint; None is the encoder that is trained: its moving average, or as
            it was at the end of the stage before.
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
        stages: in how many equal stages the trained encoder becomes the teacher at the end of one; None of others.
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
    stages: int | None = None

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


class Term(NamedTuple):
    """One target of a sum, or the only one.

    Attributes:
        text: as ``parse_target`` takes it.
        target: what that means.
        weight: its loss counts so often.
        name: what its loss is called, ``pixels``, ``features`` ..., a second one of a kind ``features_2``.
    """

    text: str
    target: Target
    weight: float = 1.0
    name: str = ""

    @property
    def of_masked_tokens(self) -> bool:
        """Whether features of the masked tokens alone are compared."""
        return self.target.features is not None and self.target.features.tokens == "masked"

    @property
    def of_own_encoder(self) -> bool:
        """Whether features of the encoder that is trained are compared: of its average, or of the stage before."""
        return self.target.features is not None and self.target.features.model is None


def split_targets(text: str) -> list[tuple[float, str]]:
    """Weight and text of each target of a sum, ``"pixels + 0.5*features:MODEL"``; the texts are not looked at.

    Raises:
        ValueError: a weight is no positive number.
    """
    parts = _PLUS.split(text)
    if len(parts) == 1:
        return [(1.0, text)]
    split = []
    for part in parts:
        match = _WEIGHT.fullmatch(part.strip())
        try:
            weight = 1.0 if match is None else float(match[1])
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise ValueError(
                f"target {text!r}: a weight must be a positive number before a *, as in pixels + 0.5*features:MODEL, "
                f"got {part.strip()!r}"
            )
        split.append((weight, part.strip() if match is None else match[2]))
    return split


def parse_targets(text: str) -> tuple[Term, ...]:
    """A target, or several with weights: ``"pixels + 0.5*features:runs/mae:layer=8"``, spaces around each plus.

    Raises:
        ValueError: what ``parse_target`` refuses, a weight that is no positive number, a target given twice, two that
            follow the trained encoder, or more than eight.
    """
    split = split_targets(text) if isinstance(text, str) else [(1.0, text)]
    if len(split) > _MOST:
        raise ValueError(f"target is a sum of {len(split)} targets; at most {_MOST} are summed")
    terms: list[Term] = []
    counts: dict[str, int] = {}
    for weight, each in split:
        target = parse_target(each)
        if any(term.target == target for term in terms):
            raise ValueError(f"target {text!r} has {each!r} twice: give it once, with the sum of the weights")
        kind = each.partition(":")[0].replace("-", "_")
        counts[kind] = counts.get(kind, 0) + 1
        terms.append(Term(each, target, weight, kind + (f"_{counts[kind]}" if counts[kind] > 1 else "")))
    own = [term.text for term in terms if term.of_own_encoder]
    if len(own) > 1:
        raise ValueError(
            f"target {text!r}: {' and '.join(map(repr, own))} both keep a copy of the trained encoder, of which a "
            "checkpoint holds one: give one of them"
        )
    return tuple(terms)


def parse_target(text: str) -> Target:
    """``"pixels"``, ``"patch-norm"``, ``"local-norm:K"``, K odd and at least 3, or features of a teacher.

    These are ``"features:MODEL"``, ``"ema"`` or ``"bootstrap"``, perhaps followed by a colon and options of
    ``FeatureTarget``: ``"features:runs/mae:layer=8,norm=ln"``.

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
    if kind == "bootstrap":
        return Target(features=FeatureTarget(None, **{"stages": 2, **_options(rest, text, (*_OF_FEATURES, "stages"))}))
    if kind == "features":
        model, _, options = rest.rpartition(":")  # a name may have a colon, too, as hf-hub:NAME
        # Nor has what is there options, whatever its path ends in.
        if not model or not _OPTION.match(options) or os.path.exists(rest):
            model, options = rest, ""
        if model:
            return Target(features=FeatureTarget(model, **_options(options, text, (*_OF_FEATURES, *_OF_MODELS))))
    raise ValueError(
        f"target must be pixels, patch-norm, local-norm:K with an odd number of pixels K of at least 3 (published: "
        f"local-norm:47), features:MODEL, ema or bootstrap, these perhaps with options "
        f"(features:MODEL:layer=-1,norm=ln), "
        f"or a sum of several with weights (pixels + 0.5*features:MODEL), got {text!r}"
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
            if name in ("layer", "layers", "img_size", "stages"):
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
                f"{', stages=NUMBER' if 'stages' in known else ''}{of_models if 'arch' in known else ''}, got {part!r}"
            ) from None
    if options.get("layers", 1) < 1 or not 0 < options.get("beta", 1.0) < float("inf"):
        raise ValueError(f"target {text!r}: layers must be at least 1 and beta positive")
    for name in ("img_size", "stages"):
        if options.get(name, 1) < 1:
            raise ValueError(f"target {text!r}: {name} must be at least 1, got {options[name]}")
    check_sizes(arguments)
    return {**options, **({"model_kwargs": arguments} if arguments else {})}
