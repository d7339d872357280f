"""Methods that predict pixels, a teacher's features, or both: what their settings may be and how they are told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mimkernels.engine.training.method import Method

if TYPE_CHECKING:
    from mimkernels.commands.pretrain.config import PretrainConfig
    from mimkernels.models.targets import Term

__all__ = [
    "TARGET_OPTIONS", "TargetMethod", "follows_encoder", "learns_words", "predicts_features", "predicts_pixels",
    "stages_of", "terms_of",
]  # fmt: skip

TARGET_OPTIONS = ("target", "target_dim", "momentum")


class TargetMethod(Method):
    """A method with ``--target``."""

    @classmethod
    def check(cls, config: Any) -> None:
        """Raise ValueError for targets, and settings of a teacher's features, that cannot work."""
        from mimkernels.models.target_sum import TargetSum

        super().check(config)
        TargetSum(config.target, config.target_dim)
        terms = terms_of(config)
        if config.momentum is not None and all(term.text.partition(":")[0] != "ema" for term in terms):
            raise ValueError(f"momentum is that of target ema, got {config.momentum} and target {config.target!r}")
        _check_stages(config)
        if config.masking == "none" and any(not term.target.features or term.of_masked_tokens for term in terms):
            raise ValueError(
                f"masking none leaves no masked token to compare: give a target of all tokens, such as "
                f"features:MODEL:tokens=all, got {config.target!r}"
            )

    @classmethod
    def paints(cls, config: Any) -> bool:
        return cls.reconstructs and predicts_pixels(config)

    @classmethod
    def pixel_words(cls, config: Any, text: str) -> str:
        """What a loss of pixels is, as ``loss_words``.

        Args:
            text: the target, of a sum one of it.
        """
        raise NotImplementedError

    @classmethod
    def loss_words(cls, config: Any) -> str:
        terms = terms_of(config)
        words = [_feature_words(term) if term.target.features else cls.pixel_words(config, term.text) for term in terms]
        if len(words) == 1:
            return words[0]
        each = (
            f"{term.weight:g} times {term.name.replace('_', ' ')}, the {said[0].lower()}{said[1:]}"
            for term, said in zip(terms, words, strict=True)
        )
        return f"The weighted sum of {len(words)} losses, each of which is drawn below it without its weight: " + (
            "; ".join(each)
        )


def terms_of(config: PretrainConfig) -> tuple[Term, ...]:
    """The target, or those that are summed."""
    from mimkernels.models.targets import parse_targets

    return parse_targets(config.target)


def predicts_features(config: PretrainConfig) -> bool:
    """Whether a teacher's features are the target, or one of several."""
    return any(term.target.features is not None for term in terms_of(config))


def predicts_pixels(config: PretrainConfig) -> bool:
    """Whether pixels are the target, or one of several."""
    return any(term.target.features is None for term in terms_of(config))


def follows_encoder(config: PretrainConfig) -> bool:
    """Whether features of the encoder that is trained are the target, or one of several."""
    return any(term.of_own_encoder for term in terms_of(config))


def stages_of(config: PretrainConfig) -> int:
    """In how many stages the model is trained, each from new weights on."""
    for term in terms_of(config):
        if term.target.features is not None and term.target.features.stages is not None:
            return term.target.features.stages
    return 1


def _check_stages(config: PretrainConfig) -> None:
    """Raise ValueError unless the stages are of whole epochs, and what happens in each of them fits into it."""
    stages = stages_of(config)
    if config.epochs % stages:
        raise ValueError(
            f"target {config.target!r} has {stages} equal stages, epochs must be a multiple of it, got {config.epochs}"
        )
    for name in ("warmup_epochs", "step_epoch"):
        epoch = getattr(config, name)
        if epoch is not None and epoch > config.epochs // stages:
            raise ValueError(
                f"{name} is counted in each of the {stages} stages of target {config.target!r}, which have "
                f"{config.epochs // stages} epochs, got {epoch}"
            )


def learns_words(config: PretrainConfig) -> str:
    """What the model learns to do with what is hidden, which follows as the object."""
    features = "predict a teacher's features of"
    if not predicts_features(config):
        return "paint"
    return f"paint, and to {features}," if predicts_pixels(config) else features


def _feature_words(term: Term) -> str:
    """What a loss against features is, as ``Method.loss_words``."""
    features = term.target.features
    assert features is not None
    error = {"smooth-l1": "Smooth L1 loss", "mse": "Mean squared error", "l1": "Mean absolute error"}
    whose = "the encoder's moving average" if features.model is None else features.model
    if features.stages is not None:
        whose = "the encoder of the stage before, at first one with random weights,"
    tokens = "all tokens" if features.tokens == "all" else "the hidden tokens"
    words = error.get(features.loss, "1 minus the cosine")
    return f"{words} of {tokens} against the features that {whose} has there, of the whole image"
