"""What a method that ``mimkernels pretrain`` trains by has to say of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from mimkernels.commands.pretrain.config import PretrainConfig

__all__ = ["Method"]


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
        """Raise ValueError for settings that cannot work together with this method."""

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
