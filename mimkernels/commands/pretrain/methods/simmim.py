"""SimMIM as a method of ``mimkernels pretrain``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mimkernels.commands.pretrain.methods.feature_targets import (
    TARGET_OPTIONS,
    TargetMethod,
    learns_words,
    predicts_pixels,
    terms_of,
)
from mimkernels.engine.training.method import MASK_OPTIONS

if TYPE_CHECKING:
    from torch import Tensor

    from mimkernels.commands.pretrain.config import PretrainConfig
    from mimkernels.data.batches import Pixels
    from mimkernels.engine.training.validation import Means

__all__ = ["SimMIM"]


class SimMIM(TargetMethod):
    title = "SimMIM"
    options = (*MASK_OPTIONS, *TARGET_OPTIONS, "mask_unit", "loss", "decay_bias_tables")
    mask_ratio, momentum = 0.6, 0.999
    ops = ("random_mask", "patchify_gather", "fill_mask_tokens", "masked_patch_loss")
    exported = "simmim_checkpoint.pth"
    sees_all = True
    blind = "predicting the mean"

    # Parameters without decay in the published code; registers, which it has not, as the other tokens.
    _UNDECAYED = ("mask_token", "cls_token", "reg_token", "pos_embed")
    _BIAS_TABLES = ("relative_position_bias_table", "cpb_mlp", "logit_scale")

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        super().check(config)
        if not predicts_pixels(config) and config.loss != "l1":
            raise ValueError(
                f"loss is that of pixels, got {config.loss!r} and target {config.target!r}: give it there, as "
                f"{config.target.partition(':')[0]}:...loss={config.loss}"
            )

    @classmethod
    def undecayed(cls, config: PretrainConfig, name: str) -> bool:
        parts = name.split(".")
        if parts[-1] in cls._UNDECAYED:
            return True
        return not config.decay_bias_tables and any(part in cls._BIAS_TABLES for part in parts)

    @staticmethod
    def draw_masks(model: Any, images: int, seed: int, offset: int) -> Tensor:
        mask: Tensor = model.draw_mask(model.blank(images), seed=seed, offset=offset)
        return mask

    @staticmethod
    def blind_loss(model: Any, images: Pixels, arguments: Mapping[str, Any], means: Means) -> Tensor | None:
        if "features" in arguments:
            return None
        loss: Tensor = model.loss_of_mean(images, arguments["mask"], means.colour)
        return loss

    @staticmethod
    def blocks(model: Any) -> list[Any]:
        return list(model.blocks)

    @staticmethod
    def weights(model: Any) -> Mapping[str, Any]:
        weights: Mapping[str, Any] = model.simmim_state_dict()
        return weights

    @staticmethod
    def masked_share(model: Any) -> float:
        share: float = model.masked_share
        return share

    @staticmethod
    def lead(config: PretrainConfig, masked_share: float | None) -> str:
        if masked_share is None:
            return "The model sees whole images and learns to predict the features of a teacher. No labels are used."
        return (
            f"{masked_share:.0%} of each image's area is hidden: its patches become one learned mask token. The model "
            f"sees all tokens and learns to {learns_words(config)} what was hidden. No labels are used."
        )

    @classmethod
    def pixel_words(cls, config: PretrainConfig, text: str) -> str:
        error = {"l1": "Mean absolute error", "mse": "Mean squared error", "smooth-l1": "Smooth L1 loss"}[config.loss]
        return f"{error} of the hidden pixels, " + {
            "pixels": "normalised by mean and deviation of the data",
            "patch-norm": "each normalised by mean and variance of the patch that is predicted with it",
        }.get(text, "each normalised by mean and variance of its neighbourhood")

    @staticmethod
    def picture_words(config: PretrainConfig) -> str:
        text = next(term.text for term in terms_of(config) if term.target.features is None)
        if text == "pixels":
            return ""
        where = "in each patch" if text == "patch-norm" else "around each pixel"
        return f"Brightness and contrast {where} are those of the original, as the loss ignores them."
