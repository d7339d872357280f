"""What differs between the methods that ``mimkernels pretrain`` trains by; imports no torch, for the parser's sake."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from mimkernels.commands.pretrain.config import PretrainConfig

__all__ = ["METHODS", "Method"]


class Method:
    """One method; no instances. How its model is built by the settings is in ``mimkernels.models.build``.

    Attributes:
        title: the method's name for people.
        options: settings that other methods have no use for.
        mask_ratio, beta2: where the settings name none.
        ops: whose backends the report names.
        exported: file of the weights under their published names.
        sees_all: whether the encoder has a token for every patch, masked or not.
    """

    title: ClassVar[str]
    options: ClassVar[tuple[str, ...]]
    mask_ratio: ClassVar[float]
    beta2: ClassVar[float]
    ops: ClassVar[tuple[str, ...]]
    exported: ClassVar[str]
    sees_all: ClassVar[bool]

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        """Raise ValueError for settings that cannot work, or that are another method's."""
        defaults = {f.name: f.default for f in fields(config)}
        for other in METHODS.values():
            for name in other.options:
                if name not in cls.options and getattr(config, name) != defaults[name]:
                    raise ValueError(
                        f"{name} is an option of {other.title}, got {getattr(config, name)!r} and method "
                        f"{config.method!r}, whose own are {', '.join(cls.options)}"
                    )

    @staticmethod
    def undecayed(config: PretrainConfig, name: str) -> bool:
        """Whether no weight decay acts on a parameter, by its name, though its shape does not say so."""
        return False

    @staticmethod
    def blocks(model: Any) -> list[Any]:
        """Transformer blocks, the parts by which FSDP2 shards."""
        raise NotImplementedError

    @staticmethod
    def weights(model: Any) -> Mapping[str, Any]:
        """Weights under their published names."""
        raise NotImplementedError

    @staticmethod
    def masked_share(model: Any) -> float:
        """Share of the patches that are masked."""
        share: float = model.mask_ratio
        return share

    @staticmethod
    def lead(masked_share: float) -> str:
        """What the model learns, in one or two sentences."""
        raise NotImplementedError

    @staticmethod
    def loss_words(config: PretrainConfig) -> str:
        """What the loss is, as the beginning of a sentence without its end."""
        raise NotImplementedError

    @staticmethod
    def picture_words(config: PretrainConfig) -> str:
        """What is to be known of reconstructed pixels; may be empty."""
        return ""


class MAE(Method):
    title = "MAE"
    options = ("decoder_dim", "decoder_depth", "decoder_heads", "norm_pix_loss")
    mask_ratio, beta2 = 0.75, 0.95
    ops = ("random_mask", "patchify_gather", "gather_tokens", "restore_tokens", "masked_patch_loss")
    exported = "mae_checkpoint.pth"
    sees_all = False

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        super().check(config)
        if config.decoder_dim % config.decoder_heads:
            raise ValueError(
                f"decoder_dim {config.decoder_dim} is not divisible by decoder_heads {config.decoder_heads}"
            )
        if config.decoder_dim % 4:
            raise ValueError(f"decoder_dim must be divisible by 4 (2-d sin-cos positions), got {config.decoder_dim}")

    @staticmethod
    def blocks(model: Any) -> list[Any]:
        return [*model.encoder.blocks, *model.decoder_blocks]

    @staticmethod
    def weights(model: Any) -> Mapping[str, Any]:
        weights: Mapping[str, Any] = model.mae_state_dict()
        return weights

    @staticmethod
    def lead(masked_share: float) -> str:
        return (
            f"The model sees {1 - masked_share:.0%} of each image's patches and learns to paint the other "
            f"{masked_share:.0%}. No labels are used."
        )

    @staticmethod
    def loss_words(config: PretrainConfig) -> str:
        return "Mean squared error on the masked patches, " + (
            "each patch normalised by its own mean and variance" if config.norm_pix_loss else "of normalised pixels"
        )

    @staticmethod
    def picture_words(config: PretrainConfig) -> str:
        if not config.norm_pix_loss:
            return ""
        return "Brightness and contrast of each painted patch are those of the original, as the loss ignores them."


class SimMIM(Method):
    title = "SimMIM"
    options = ("mask_unit", "target", "loss", "decay_bias_tables")
    mask_ratio, beta2 = 0.6, 0.999
    ops = ("random_mask", "patchify_gather", "fill_mask_tokens", "masked_patch_loss")
    exported = "simmim_checkpoint.pth"
    sees_all = True

    # Parameters without decay in the published code; registers, which it has not, as the other tokens.
    _UNDECAYED = ("mask_token", "cls_token", "reg_token", "pos_embed")
    _BIAS_TABLES = ("relative_position_bias_table", "cpb_mlp", "logit_scale")

    @classmethod
    def undecayed(cls, config: PretrainConfig, name: str) -> bool:
        parts = name.split(".")
        if parts[-1] in cls._UNDECAYED:
            return True
        return not config.decay_bias_tables and any(part in cls._BIAS_TABLES for part in parts)

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
    def lead(masked_share: float) -> str:
        return (
            f"{masked_share:.0%} of each image's area is hidden: its patches become one learned mask token. The model "
            "sees all tokens and learns to paint what was hidden. No labels are used."
        )

    @staticmethod
    def loss_words(config: PretrainConfig) -> str:
        error = {"l1": "Mean absolute error", "mse": "Mean squared error", "smooth-l1": "Smooth L1 loss"}[config.loss]
        return f"{error} of the hidden pixels, " + {
            "pixels": "normalised by mean and deviation of the data",
            "patch-norm": "each normalised by mean and variance of the patch that is predicted with it",
        }.get(config.target, "each normalised by mean and variance of its neighbourhood")

    @staticmethod
    def picture_words(config: PretrainConfig) -> str:
        if config.target == "pixels":
            return ""
        where = "in each patch" if config.target == "patch-norm" else "around each pixel"
        return f"Brightness and contrast {where} are those of the original, as the loss ignores them."


METHODS: dict[str, type[Method]] = {"mae": MAE, "simmim": SimMIM}
