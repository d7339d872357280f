"""Supervised classification as a method of ``mimkernels pretrain``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mimkernels.engine.training.method import Method
from mimkernels.engine.training.mixing import check_pairs, mix_pairs

if TYPE_CHECKING:
    from torch import Tensor

    from mimkernels.commands.pretrain.config import PretrainConfig
    from mimkernels.data.batches import Pixels
    from mimkernels.engine.training.validation import Means

__all__ = ["Supervised"]

_LONG = 50  # epochs from which on images are mixed unless the settings say otherwise
_MIXUP, _CUTMIX = 0.8, 1.0  # as DeiT


class Supervised(Method):
    title = "supervised"
    options = ("num_classes", "label_smoothing", "mixup", "cutmix")
    masks, reconstructs, labelled = False, False, True
    blr, warmup_share = 2.5e-4, 0.2
    ops = ("patchify_gather", "gather_tokens", "attention", "bias_gelu", "add_layer_norm")
    exported = "supervised_checkpoint.pth"
    sees_all = True
    blind = "giving every image the shares of the classes"

    _UNDECAYED = ("cls_token", "reg_token", "pos_embed", "relative_position_bias_table", "logit_scale")

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        check_pairs(*mixing(config), config.batch_size)

    @classmethod
    def call(
        cls, config: PretrainConfig, images: Pixels, targets: Tensor | None, *, seed: int, training: bool
    ) -> tuple[Any, dict[str, Any]]:
        mixup, cutmix = mixing(config)
        if not training or not max(mixup, cutmix):
            return images, {"targets": targets}
        from mimkernels.data.batches import drawing_from

        assert config.num_classes is not None and targets is not None
        pixels = images.float() / 255  # type: ignore[union-attr] # one view
        with drawing_from(seed):
            mixed, shares = mix_pairs(pixels, targets, mixup=mixup, cutmix=cutmix, num_classes=config.num_classes)
        return mixed, {"targets": shares}

    @staticmethod
    def blind_loss(model: Any, images: Pixels, arguments: Mapping[str, Any], means: Means) -> Tensor | None:
        from torch.nn.functional import cross_entropy

        assert means.shares is not None
        smoothing = model.label_smoothing
        shares = (1 - smoothing) * means.shares + smoothing / len(means.shares)
        targets = arguments["targets"]
        logits = shares.clamp(min=1e-12).log().to(targets.device).expand(len(targets), -1)
        return cross_entropy(logits, targets, label_smoothing=smoothing)

    @classmethod
    def undecayed(cls, config: PretrainConfig, name: str) -> bool:
        return name.split(".")[-1] in cls._UNDECAYED or ".cpb_mlp." in name

    @staticmethod
    def blocks(model: Any) -> list[Any]:
        return list(model.blocks)

    @staticmethod
    def weights(model: Any) -> Mapping[str, Any]:
        weights: Mapping[str, Any] = model.timm_state_dict()
        return weights

    @staticmethod
    def lead(config: PretrainConfig, masked_share: float | None) -> str:
        return f"The model learns to name the class of an image, one of {config.num_classes}, from labels."

    @staticmethod
    def loss_words(config: PretrainConfig) -> str:
        mixup, cutmix = mixing(config)
        mixed = " and ".join(name for name, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha)
        return (
            "Cross-entropy of the classes"
            + (
                f", {config.label_smoothing:.0%} of each target spread over all of them"
                if config.label_smoothing
                else ""
            )
            + (f"; training images are mixed by {mixed}" if mixed else "")
        )


def mixing(config: PretrainConfig) -> tuple[float, float]:
    """Alpha of mixup and of cutmix; 0 for none."""
    mixup = (_MIXUP if config.epochs >= _LONG else 0.0) if config.mixup is None else config.mixup
    cutmix = (_CUTMIX if config.epochs >= _LONG else 0.0) if config.cutmix is None else config.cutmix
    return mixup, cutmix
