"""DINO, self-distillation without labels, as a method of ``mimkernels pretrain``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mimkernels.engine.settings import require_unset
from mimkernels.engine.training.method import VIEW_OPTIONS, Method, Moment

if TYPE_CHECKING:
    from mimkernels.commands.pretrain.config import PretrainConfig
    from mimkernels.data.batches import Augmentation, Views

__all__ = ["DINO"]

_FROZEN_EPOCHS = 1  # in which the last layer stays as it is, as published
_LOCAL = 96 / 224  # side of a local view, of that of a global one, as published
_ALIKE = 0.999  # share of the largest entropy


class DINO(Method):
    title = "DINO"
    options = (
        *VIEW_OPTIONS, "local_crops", "local_size", "local_scale", "prototypes", "bottleneck_dim", "student_temp",
        "teacher_temp", "warmup_teacher_temp", "warmup_teacher_temp_epochs", "weight_decay_end", "mlp_dim", "momentum",
    )  # fmt: skip
    masks, reconstructs, target_moves = False, False, True
    blr, weight_decay, warmup_share = 5e-4, 0.04, 0.1
    clip_grad, clips_each = 3.0, True
    crop_scale, momentum = 0.4, 0.996
    ops = ("patchify_gather", "gather_tokens", "attention", "bias_gelu", "add_layer_norm")
    exported = "dino_checkpoint.pth"
    sees_all = True

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        if config.local_crops:
            size, patch = local_size(config), _patch(config)
            if size % patch:
                fits = max(1, size // patch) * patch
                raise ValueError(f"local_size {size} is not divisible by the patches' {patch} pixels: try {fits}")
        else:
            require_unset(config, ["local_size", "local_scale"], "with local_crops 0")
        if not config.warmup_teacher_temp_epochs:
            require_unset(config, ["warmup_teacher_temp"], "with warmup_teacher_temp_epochs 0")
        if config.local_scale > config.value("crop_scale"):
            raise ValueError(
                "local views are crops of local_scale to crop_scale of the image's area, got "
                f"{config.local_scale} and {config.value('crop_scale')}"
            )
        if config.warmup_teacher_temp_epochs > config.epochs:
            raise ValueError(
                f"warmup_teacher_temp_epochs must be in 0..{config.epochs} (epochs), got "
                f"{config.warmup_teacher_temp_epochs}"
            )
        if not config.value("weight_decay") and config.weight_decay_end:
            raise ValueError(
                f"weight decay cannot rise from 0 to weight_decay_end {config.weight_decay_end}: give both as 0, or "
                "a weight_decay above it"
            )

    @staticmethod
    def views(config: PretrainConfig, augmentation: Augmentation) -> Views:
        from mimkernels.data.views import MultiCrop, Strength

        return MultiCrop(
            config.img_size,
            config.in_chans,
            augmentation.crop_scale,
            augmentation.hflip,
            local_crops=config.local_crops,
            local_size=local_size(config),
            local_scale=config.local_scale,
            strength=Strength(config.color_jitter, config.blur_prob, config.solarize_prob),
        )

    @classmethod
    def schedule(cls, config: PretrainConfig, at: Moment) -> dict[str, float]:
        from mimkernels.models.momentum import half_cosine

        start, end = config.value("weight_decay"), config.weight_decay_end
        values = {
            "momentum": half_cosine(config.value("momentum"), 1.0, at.share),
            "weight_decay": half_cosine(start, end, at.share),
        }
        if config.warmup_teacher_temp_epochs:
            values["teacher_temp"] = _teacher_temp(config, int(at.epoch))
        return values

    @staticmethod
    def before_step(model: Any, scheduled: Mapping[str, float], at: Moment) -> None:
        model.teacher_temp = scheduled.get("teacher_temp", model.teacher_temp)

    @staticmethod
    def before_update(model: Any, scheduled: Mapping[str, float], at: Moment) -> None:
        if at.step < _FROZEN_EPOCHS * at.steps_per_epoch:
            for parameter in model.head.last_layer.parameters():
                parameter.grad = None

    @staticmethod
    def after_step(model: Any, scheduled: Mapping[str, float], at: Moment) -> None:
        model.update_teacher(scheduled["momentum"])

    @staticmethod
    def blocks(model: Any) -> list[Any]:
        return list(model.blocks)

    @staticmethod
    def content(model: Any) -> dict[str, Any]:
        content: dict[str, Any] = model.dino_state_dict()
        return content

    @staticmethod
    def lead(config: PretrainConfig, masked_share: float | None) -> str:
        local = f" and {config.local_crops} local ones of {local_size(config)} pixels" if config.local_crops else ""
        return (
            f"The model sees two global views{local} of every image: a student learns, without labels, to say of each "
            "view what its own moving average, the teacher, says of another. The teacher's encoder is what probe and "
            "analyze read."
        )

    @staticmethod
    def loss_words(config: PretrainConfig) -> str:
        return (
            f"Cross-entropy between the teacher's and the student's distributions over {config.prototypes:,} "
            "prototypes. The teacher changes with the student: a loss that rises or stands still need not mean that "
            "nothing is learned. A collapsed model shows: the entropy of the teacher is near "
            f"{math.log(config.prototypes):.3g}, all prototypes alike for every image, or near 0 as the loss, one for "
            "all; and feature std is near 0"
        )

    @staticmethod
    def verdict(config: PretrainConfig, untrained: Mapping[str, float], now: Mapping[str, float]) -> str:
        before, entropy = untrained["teacher_entropy"], now["teacher_entropy"]
        text = (
            f"Of the loss on new images {entropy:.4g} is the entropy of the teacher, which no student gets below, and "
            f"{now['loss'] - entropy:.4g} the student's distance from it; {before:.4g} and "
            f"{untrained['loss'] - before:.4g} before training."
        )
        if entropy > _ALIKE * math.log(config.prototypes):
            text += " To the teacher all prototypes are alike, whatever the image: the model has collapsed."
        return text


def local_size(config: PretrainConfig) -> int:
    """Side of the local views: as set, or the multiple of the patch next to the published share of the global ones."""
    if config.local_size is not None:
        return config.local_size
    patch = _patch(config)
    return max(1, round(config.img_size * _LOCAL / patch)) * patch


def _patch(config: PretrainConfig) -> int:
    """Side of a patch in pixels, of timm's models as their names say."""
    named = re.search(r"patch(\d+)", config.model)
    return config.patch_size or (int(named[1]) if named else 16)


def _teacher_temp(config: PretrainConfig, epoch: int) -> float:
    """Of an epoch: by equal steps from the first epoch's to the temperature itself in the last one of the warm-up."""
    first, last, epochs = config.warmup_teacher_temp, config.teacher_temp, config.warmup_teacher_temp_epochs
    if epoch >= epochs:
        return last
    return first + (last - first) * epoch / max(1, epochs - 1)
