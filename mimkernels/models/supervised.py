"""Supervised classification, the baseline beside masked image modeling: the same encoders, trained with labels."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mimkernels.models.base import ImageModel, check_computed_by, check_integers, check_numbers
from mimkernels.models.checkpoint import CheckpointReport, copy_by_name, read_weights
from mimkernels.models.masked_encoders import compute_by, create_masked_encoder, encode, family_of, readout, tokens_read

__all__ = ["Supervised", "SupervisedOutput"]


class SupervisedOutput(NamedTuple):
    """What one forward pass gives.

    Attributes:
        loss: fp32 scalar, the mean cross-entropy of the batch.
        logits: ``[B, classes]``.
        metrics: ``accuracy``, the share of images whose class has the largest logit (of a mixed image: the class that
            has most of it), without gradients.
        head_stats: as of ``MAEOutput``, over all tokens.
    """

    loss: Tensor
    logits: Tensor
    metrics: dict[str, Tensor]
    head_stats: list[dict[str, Tensor]] | None = None


class Supervised(ImageModel):
    """A timm ViT, BEiT, Swin or Swin V2 that classifies images, trained from scratch: one linear layer on [cls].

    The readout is the [cls] token, so that its attention means something; of an encoder without one, the mean over the
    patch tokens. Hooks on the encoder's blocks and norms fire as usual; ``encoder.patch_embed`` is not called, its
    weights are used.

    Args:
        encoder: a timm model without head, with the weights it is to start from.
        num_classes: of the labels.
        label_smoothing: share of every target that is spread over all classes.
        mean, std: per channel, for pixels in [0, 1]: images are normalised inside the kernels. uint8 images
            need both. None: images come as the encoder wants them.
        attention, mlp, block: "mimkernels" lets the blocks compute with ``mimkernels.attention``,
            ``mimkernels.bias_gelu`` and ``mimkernels.add_layer_norm`` where their kind is supported, in place; "timm"
            leaves them as they are. Weights and results are the same.

    Example::

        model = Supervised.from_timm("vit_tiny_patch16_224", num_classes=10)
        loss = model(images, targets=labels).loss

    Source: the recipe of DeiT, arXiv:2012.12877, without distillation.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        num_classes: int,
        label_smoothing: float = 0.1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        attention: str = "mimkernels",
        mlp: str = "mimkernels",
        block: str = "mimkernels",
    ) -> None:
        super().__init__()
        self._family = family_of(encoder)
        check_computed_by(attention=attention, mlp=mlp, block=block)
        check_integers(num_classes=num_classes)
        check_numbers(label_smoothing=label_smoothing)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        self._set_encoder(encoder)
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self._set_pixel_statistics(mean, std)
        self.head = nn.Linear(self.encoder.num_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        compute_by(encoder, attention=attention, mlp=mlp, block=block)

    @classmethod
    def from_timm(
        cls,
        name: str,
        *,
        num_classes: int,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        patch_size: int | Sequence[int] | None = None,
        label_smoothing: float = 0.1,
        drop_path_rate: float = 0.1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        attention: str = "mimkernels",
        mlp: str = "mimkernels",
        block: str = "mimkernels",
        **timm_kwargs: Any,
    ) -> "Supervised":
        """A new model around the timm encoder `name`, built and initialised as ``SimMIM.from_timm`` does.

        Args:
            name: a timm ``vit_*``, ``beit_*``, ``swin_*`` or ``swinv2_*``.
            img_size: pixels per side, or ``(height, width)``.
            in_chans: channels of the images.
            patch_size: pixels per patch side, or ``(height, width)``; None takes the model's own.
            drop_path_rate: stochastic depth of the last block; those before it have less.
            timm_kwargs: further arguments of the timm model. With ``pretrained=True`` or ``checkpoint_path`` the
                encoder keeps those weights.

        The other arguments are those of the class.

        Raises:
            ValueError: the name is unknown, or the model or an argument is not supported; says what and why.
        """
        encoder = create_masked_encoder(
            name,
            img_size=img_size,
            in_chans=in_chans,
            patch_size=patch_size,
            drop_path_rate=drop_path_rate,
            **timm_kwargs,
        )
        own: dict[str, Any] = {
            "num_classes": num_classes,
            "label_smoothing": label_smoothing,
            "mean": mean,
            "std": std,
            "attention": attention,
            "mlp": mlp,
            "block": block,
        }
        shape = {
            "img_size": img_size,
            "in_chans": in_chans,
            "patch_size": patch_size,
            "drop_path_rate": drop_path_rate,
        }
        return cls._initialised(encoder, family_of(encoder).init, name, shape, own, timm_kwargs)

    @property
    def blocks(self) -> list[nn.Module]:
        """The encoder's transformer blocks, in their order."""
        return list(self._family.blocks(self.encoder))

    def forward(self, images: Tensor, *, targets: Tensor, head_stats: Sequence[str] = ()) -> SupervisedOutput:
        """Encode, classify, compare with the labels.

        Args:
            images: ``[B, C, H, W]`` uint8 (with the model's mean and std) or floating point.
            targets: ``[B]`` int64 class numbers, or ``[B, classes]`` floating point, the share of every class in a
                mixed image.
            head_stats: statistics of ``mimkernels.attention`` to return for every encoder block, over all patches;
                distances are in patches. They carry gradients: terms of them can be added to the loss.

        Raises:
            ValueError, TypeError: images or targets do not fit the model; the message shows both sides. Or the
                encoder's attention cannot record statistics.
        """
        self._check_images(images)
        self._check_targets(images, targets)
        with self._recorded(images, head_stats) as heads:
            logits = self._logits(images)
        layer_stats = [layer.stats for layer in heads] if head_stats else None
        loss = self._loss(logits.float(), targets)
        with torch.no_grad():
            classes = targets if targets.dim() == 1 else targets.argmax(1)
            accuracy = (logits.argmax(1) == classes).float().mean()
        return SupervisedOutput(loss, logits, {"accuracy": accuracy}, layer_stats)

    def encode(self, images: Tensor, *, first: int | None = None) -> Tensor:
        """The encoder's normalised output ``[B, P + L, D]``, prefix tokens first, or its first so many tokens."""
        return encode(self.encoder, images, self._pixel_mean, self._pixel_std, first=first)

    def classify(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of tokens as ``encode`` gives them."""
        logits: Tensor = self.head(readout(self.encoder, tokens))
        return logits

    def load_checkpoint(self, source: str | os.PathLike | Mapping[str, Any]) -> CheckpointReport:
        """Load weights under timm's names, all of them or none: a file or dict, ``{"model": {...}}`` or the names.

        Raises:
            ValueError: another architecture (lists names and shapes of both sides), or not a file of tensors.
        """
        title = f"{self._title()}, {self.num_classes} classes"
        return copy_by_name(self.timm_state_dict(), read_weights(source), title=title)

    def timm_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of timm's model with a head; they share this model's memory."""
        return {name.removeprefix("encoder."): tensor for name, tensor in self.state_dict().items()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass."""
        self.encoder.set_grad_checkpointing(enable)

    def _logits(self, images: Tensor) -> Tensor:
        return self.classify(self.encode(images, first=self._tokens_read()))

    def _tokens_read(self) -> int | None:
        """How many of the first tokens ``classify`` reads, if it reads no others."""
        return tokens_read(self.encoder)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def _check_targets(self, images: Tensor, targets: Tensor) -> None:
        if not isinstance(targets, Tensor):
            raise TypeError(f"targets must be a torch.Tensor, got {type(targets).__name__}")
        batch = images.shape[0]
        wanted = f"[{batch}] int64 or [{batch}, {self.num_classes}] floating point"
        shape = [batch, self.num_classes] if targets.is_floating_point() else [batch]
        if list(targets.shape) != shape or not (targets.is_floating_point() or targets.dtype == torch.int64):
            raise ValueError(f"targets must be {wanted}, got {list(targets.shape)} {targets.dtype}")
        if targets.device != images.device:
            raise ValueError(f"targets are on {targets.device} but images are on {images.device}")
        if targets.device.type == "cpu" and not targets.is_floating_point() and batch:
            low, high = int(targets.min()), int(targets.max())
            if low < 0 or high >= self.num_classes:
                raise IndexError(f"targets must be 0 to {self.num_classes - 1}, got {low} to {high}")
