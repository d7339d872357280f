"""MoCo v3 as a method of ``mimkernels pretrain``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mimkernels.engine.training.method import VIEW_OPTIONS, Method, Moment

if TYPE_CHECKING:
    from torch import Tensor

    from mimkernels.commands.pretrain.config import PretrainConfig
    from mimkernels.data.batches import Augmentation, Pixels, Views
    from mimkernels.engine.training.validation import Means

__all__ = ["MoCoV3"]


class MoCoV3(Method):
    title = "MoCo v3"
    options = (
        *VIEW_OPTIONS, "temperature", "momentum", "mlp_dim", "out_dim", "stop_grad_conv1", "sincos_positions",
    )  # fmt: skip
    masks, reconstructs = False, False
    weight_decay, warmup_share = 0.1, 40 / 300
    momentum, crop_scale = 0.99, 0.08
    ops = ("patchify_gather", "gather_tokens", "attention", "bias_gelu", "add_layer_norm")
    exported = "mocov3_checkpoint.pth"
    sees_all = True
    blind = "finding all images of the batch equally similar"

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        if config.batch_size < 2:
            raise ValueError(
                f"MoCo v3 tells images of a batch apart: batch_size must be at least 2, got {config.batch_size}"
            )

    @staticmethod
    def views(config: PretrainConfig, augmentation: Augmentation) -> Views:
        from mimkernels.data.views import AsymmetricViews, Strength

        strength = Strength(config.color_jitter, config.blur_prob, config.solarize_prob)
        return AsymmetricViews(config.img_size, config.in_chans, augmentation.crop_scale, augmentation.hflip, strength)

    @staticmethod
    def blind_loss(model: Any, images: Pixels, arguments: Mapping[str, Any], means: Means) -> Tensor | None:
        # Two directions, each the cross-entropy of equal shares times 2 T.
        return images[0].new_full((), 4 * model.temperature * math.log(len(images[0])), dtype=means.colour.dtype)

    @classmethod
    def schedule(cls, config: PretrainConfig, at: Moment) -> dict[str, float]:
        from mimkernels.models.momentum import half_cosine

        return {"momentum": half_cosine(config.value("momentum"), 1.0, at.share)}

    @staticmethod
    def before_step(model: Any, scheduled: Mapping[str, float], at: Moment) -> None:
        # Before the keys are computed, and once for all forward passes of a step.
        model.follow(scheduled["momentum"])

    @staticmethod
    def blocks(model: Any) -> list[Any]:
        return list(model.blocks)

    @staticmethod
    def weights(model: Any) -> Mapping[str, Any]:
        weights: Mapping[str, Any] = model.mocov3_state_dict()
        return weights

    @classmethod
    def content(cls, model: Any) -> dict[str, Any]:
        return {"state_dict": cls.weights(model)}

    @staticmethod
    def lead(config: PretrainConfig, masked_share: float | None) -> str:
        colour = " and colour" if config.in_chans == 3 else ""
        return (
            f"The model sees two views of each image, cropped and changed in brightness{colour}, and learns to find "
            "the second view of an image among those of the other images of the batch. No labels are used."
        )

    @staticmethod
    def loss_words(config: PretrainConfig) -> str:
        temperature = config.temperature
        return (
            f"Cross-entropy of finding an image's other view in the batch, by cosine similarity divided by a "
            f"temperature of {temperature:g}; both directions are added, times {2 * temperature:g}. It depends on the "
            "batch size"
        )
