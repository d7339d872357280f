"""What a model predicts: pixels, themselves or normalised by their patch or neighbourhood, or a teacher's features."""

import re
from typing import Any, NamedTuple

from torch import Tensor

from mimkernels.ops import masked_feature_loss

__all__ = ["FeatureTarget", "Target", "parse_target"]

_LOCAL = re.compile(r"local-norm:(\d+)")
_OPTION = re.compile(r"[a-z]+=")
_CHOICES = {
    "norm": ("ln", "instance", "none"),
    "loss": ("smooth-l1", "mse", "l1", "cosine"),
    "tokens": ("masked", "all"),
}


class FeatureTarget(NamedTuple):
    """Features of a teacher that see the whole image.

    Attributes:
        model: a timm name, run folder or checkpoint; None is the moving average of the encoder that is trained.
        layer: the block whose output they are; -1 is what the encoder gives, after its last norm.
        layers: the mean of so many blocks (of fewer there are, all), the last one that of `layer`, each normalised by
            LayerNorm without gain; None takes the output of one as it is.
        norm: "ln", LayerNorm without gain of every token; "instance", every feature over the tokens of an image;
            "none".
        loss: "smooth-l1", "mse", "l1" or "cosine".
        beta: where smooth L1 turns from square to linear.
        tokens: those that are compared, "masked" or "all".
    """

    model: str | None
    layer: int = -1
    layers: int | None = None
    norm: str = "ln"
    loss: str = "smooth-l1"
    beta: float = 1.0
    tokens: str = "masked"

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
        return Target(features=FeatureTarget(None, **{"layers": 10, **_options(rest, text)}))
    if kind == "features":
        model, _, options = rest.rpartition(":")  # a name may have a colon, too, as hf-hub:NAME
        if not model or not _OPTION.match(options):
            model, options = rest, ""
        if model:
            return Target(features=FeatureTarget(model, **_options(options, text)))
    raise ValueError(
        f"target must be pixels, patch-norm, local-norm:K with an odd number of pixels K of at least 3 (published: "
        f"local-norm:47), features:MODEL or ema, the last two perhaps with options (features:MODEL:layer=-1,norm=ln), "
        f"got {text!r}"
    )


def _options(given: str, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in given.split(",") if given else []:
        name, _, value = part.partition("=")
        try:
            if name in ("layer", "layers"):
                options[name] = int(value)
            elif name == "beta":
                options[name] = float(value)
            elif name in _CHOICES and value in _CHOICES[name]:
                options[name] = value
            else:
                raise ValueError
        except ValueError:
            choices = ", ".join(f"{key}={'|'.join(values)}" for key, values in _CHOICES.items())
            raise ValueError(
                f"target {text!r}: an option must be layer=NUMBER, layers=NUMBER, beta=NUMBER, {choices}, got {part!r}"
            ) from None
    if options.get("layers", 1) < 1 or not 0 < options.get("beta", 1.0) < float("inf"):
        raise ValueError(f"target {text!r}: layers must be at least 1 and beta positive")
    return options
