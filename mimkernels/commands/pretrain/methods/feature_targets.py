"""Methods that predict pixels or, instead, a teacher's features: what their settings may be and how they are told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mimkernels.engine.training.method import Method

if TYPE_CHECKING:
    from mimkernels.commands.pretrain.config import PretrainConfig

__all__ = ["TARGET_OPTIONS", "TargetMethod", "feature_words", "predicts_features"]

TARGET_OPTIONS = ("target", "target_dim", "momentum")


class TargetMethod(Method):
    """A method with ``--target``."""

    @classmethod
    def check(cls, config: Any) -> None:
        """Raise ValueError for settings of a teacher's features that cannot work."""
        from mimkernels.models.targets import parse_target

        super().check(config)
        features = parse_target(config.target).features
        if config.momentum is not None and (features is None or features.model is not None):
            raise ValueError(f"momentum is that of target ema, got {config.momentum} and target {config.target!r}")
        if config.target_dim is not None and features is None:
            raise ValueError(
                f"target_dim is the width of features, got {config.target_dim} and target {config.target!r}"
            )
        if config.masking == "none" and (features is None or features.tokens != "all"):
            raise ValueError(
                f"masking none leaves no masked token to compare: give a target of all tokens, such as "
                f"features:MODEL:tokens=all, got {config.target!r}"
            )

    @classmethod
    def paints(cls, config: Any) -> bool:
        return cls.reconstructs and not predicts_features(config)


def predicts_features(config: PretrainConfig) -> bool:
    """Whether a teacher's features are the target."""
    return config.target.partition(":")[0] in ("features", "ema")


def feature_words(config: PretrainConfig) -> str:
    """What a loss against features is, as ``Method.loss_words``."""
    from mimkernels.models.targets import parse_target

    features = parse_target(config.target).features
    assert features is not None
    error = {"smooth-l1": "Smooth L1 loss", "mse": "Mean squared error", "l1": "Mean absolute error"}
    whose = "the encoder's moving average" if features.model is None else features.model
    tokens = "all tokens" if features.tokens == "all" else "the hidden tokens"
    words = error.get(features.loss, "1 minus the cosine")
    return f"{words} of {tokens} against the features that {whose} has there, of the whole image"
