"""Masked autoencoders as a method of ``mimkernels pretrain``."""

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
from mimkernels.engine.settings import require_unset
from mimkernels.engine.training.method import MASK_OPTIONS

if TYPE_CHECKING:
    from torch import Tensor

    from mimkernels.commands.pretrain.config import PretrainConfig
    from mimkernels.data.batches import Pixels
    from mimkernels.engine.training.validation import Means

__all__ = ["MAE"]


class MAE(TargetMethod):
    title = "MAE"
    options = (*MASK_OPTIONS, *TARGET_OPTIONS, "decoder_dim", "decoder_depth", "decoder_heads", "norm_pix_loss")
    mask_ratio, beta2, momentum = 0.75, 0.95, 0.999
    ops = ("random_mask", "patchify_gather", "gather_tokens", "restore_tokens", "masked_patch_loss")
    exported = "mae_checkpoint.pth"
    sees_all = False
    blind = "predicting the mean"

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        if config.decoder_dim % config.decoder_heads:
            raise ValueError(
                f"decoder_dim {config.decoder_dim} is not divisible by decoder_heads {config.decoder_heads}"
            )
        if config.decoder_dim % 4:
            raise ValueError(f"decoder_dim must be divisible by 4 (2-d sin-cos positions), got {config.decoder_dim}")
        super().check(config)
        if config.masking == "none":
            raise ValueError("masking none is for methods whose encoder sees all patches, such as simmim, got mae")
        if any(term.target.features is None and term.text != "pixels" for term in terms_of(config)):
            raise ValueError(f"target of mae must be pixels, features:MODEL, ema or bootstrap, got {config.target!r}")
        if not predicts_pixels(config):
            require_unset(config, ["norm_pix_loss"], f"on target {config.target!r}")

    @staticmethod
    def draw_masks(model: Any, images: int, seed: int, offset: int) -> Tensor:
        mask: Tensor = model.draw_mask(model.blank(images), seed=seed, offset=offset).mask
        return mask.bool().unflatten(1, model.grid_size)

    @staticmethod
    def blind_loss(model: Any, images: Pixels, arguments: Mapping[str, Any], means: Means) -> Tensor | None:
        if "features" in arguments:
            return None
        loss: Tensor = model.loss_of_mean(images, arguments["mask"], means.colour)
        return loss

    @staticmethod
    def blocks(model: Any) -> list[Any]:
        return [*model.encoder.blocks, *model.decoder_blocks]

    @staticmethod
    def weights(model: Any) -> Mapping[str, Any]:
        weights: Mapping[str, Any] = model.mae_state_dict()
        return weights

    @staticmethod
    def lead(config: PretrainConfig, masked_share: float | None) -> str:
        assert masked_share is not None
        return (
            f"The model sees {1 - masked_share:.0%} of each image's patches and learns to {learns_words(config)} the "
            f"other {masked_share:.0%}. No labels are used."
        )

    @classmethod
    def pixel_words(cls, config: PretrainConfig, text: str) -> str:
        return "Mean squared error on the masked patches, " + (
            "each patch normalised by its own mean and variance" if config.norm_pix_loss else "of normalised pixels"
        )

    @staticmethod
    def picture_words(config: PretrainConfig) -> str:
        if not config.norm_pix_loss:
            return ""
        return "Brightness and contrast of each painted patch are those of the original, as the loss ignores them."
