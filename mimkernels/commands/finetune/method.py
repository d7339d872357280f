"""Fine-tuning as a method of the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mimkernels.engine.training.method import Method, Moment
from mimkernels.engine.training.mixing import mix_pairs

if TYPE_CHECKING:
    from torch import Tensor

    from mimkernels.data.batches import Pixels

__all__ = ["Finetune"]


class Finetune(Method):
    title = "fine-tuning"
    options = ()
    masks, reconstructs, labelled = False, False, True
    blr, warmup_share = 1e-3, 0.1  # as MAE of ViT-L: 5 epochs of 50
    ops = ("patchify_gather", "gather_tokens", "attention", "bias_gelu", "add_layer_norm")
    exported = "final.pth"
    best = "accuracy"
    sees_all = True

    @classmethod
    def call(
        cls, config: Any, images: Pixels, targets: Tensor | None, *, seed: int, training: bool
    ) -> tuple[Any, dict[str, Any]]:
        mixes = max(config.mixup, config.cutmix) > 0
        if not training or not (config.erasing or mixes):
            return images, {"targets": targets}
        from timm.data.random_erasing import RandomErasing

        from mimkernels.data.batches import drawing_from
        from mimkernels.models.build import pixel_statistics

        # In this order as published: noise of deviation 1 on normalised pixels, then mixed images. The model
        # normalises what it is given and smooths the targets.
        pixels = images.float() / 255  # type: ignore[union-attr] # one view
        with drawing_from(seed):
            if config.erasing:
                mean, std = (
                    pixels.new_tensor(values).view(-1, 1, 1)
                    for values in pixel_statistics(config.pixel_stats, config.in_chans)
                )
                erase = RandomErasing(config.erasing, mode="pixel", device=pixels.device)
                pixels = erase((pixels - mean) / std) * std + mean
            if mixes:
                assert targets is not None
                pixels, targets = mix_pairs(
                    pixels, targets, mixup=config.mixup, cutmix=config.cutmix, num_classes=config.num_classes
                )
        return pixels, {"targets": targets}

    @staticmethod
    def after_step(model: Any, scheduled: Mapping[str, float], at: Moment) -> None:
        model.follow(at.step + 1)

    @staticmethod
    def blocks(model: Any) -> list[Any]:
        return list(model.blocks)

    @staticmethod
    def weights(model: Any) -> Mapping[str, Any]:
        weights: Mapping[str, Any] = model.timm_state_dict()
        return weights

    @classmethod
    def content(cls, model: Any) -> dict[str, Any]:
        return {"model": cls.weights(model), "timm": model.timm_arguments()}

    @staticmethod
    def loss_words(config: Any) -> str:
        mixed = " and ".join(name for name in ("mixup", "cutmix") if getattr(config, name))
        return (
            "Cross-entropy of the classes; of training images"
            + (f" with {config.label_smoothing:.0%} of each target spread over all of them" if config.label_smoothing
               else "")
            + (f", mixed by {mixed}" if mixed else "")
            + ", augmented; of new images plain"
        )  # fmt: skip
