"""MoCo v3: two views of an image are told from those of other images; a baseline beside masked image modeling."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mimkernels.models.base import ImageModel, check_computed_by, check_integers, check_numbers
from mimkernels.models.checkpoint import CheckpointReport, copy_by_name, read_file, weights_of
from mimkernels.models.masked_encoders import ViT, compute_by, create_masked_encoder, family_of, represent
from mimkernels.models.momentum import copy_without_gradients, feature_std, follow, gather
from mimkernels.nn import sincos_positions_2d
from mimkernels.nn.processes import distributed

__all__ = ["MoCoV3", "MoCoV3Output"]

# Published names, which a wrapper's `module.` stands before.
_PUBLISHED = {
    "encoder.": "base_encoder.",
    "projector.": "base_encoder.head.",
    "momentum_encoder.": "momentum_encoder.",
    "momentum_projector.": "momentum_encoder.head.",
    "predictor.": "predictor.",
}


class MoCoV3Output(NamedTuple):
    """What one forward pass gives.

    Attributes:
        loss: fp32 scalar, the contrastive loss of both directions.
        metrics: ``feature_std``, the spread of the encoder's L2-normalised readout over the views of the batch,
            without gradients: 1 for directions of all kinds, 0 for a model that has collapsed.
        head_stats: as of ``MAEOutput``, over all tokens of both views.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    head_stats: list[dict[str, Tensor]] | None = None


class MoCoV3(ImageModel):
    """A timm ViT, BEiT, Swin or Swin V2 that learns which two views are of one image.

    Encoder, projector and predictor make a query of each view; a momentum encoder with its projector, whose weights
    follow by a moving average, makes a key. A query has to be closest to the other view's key of its image, among the
    keys of the batch of all processes. The readout is [cls]; of an encoder without one, the mean over the patches.

    Whoever writes the training loop calls ``follow`` before the forward passes of every optimizer step: the keys are
    those of the average that has seen the weights as they are. In eval mode a batch is compared with itself alone,
    whatever other processes have.

    Args:
        encoder: a timm model without head, with the weights it is to start from.
        temperature: T; similarities are divided by it, the loss is multiplied by 2 T.
        mlp_dim: width of the hidden layers of projector and predictor.
        out_dim: width of what they give.
        stop_grad_conv1: keep the patch projection as it was initialised, against instability in training.
        sincos_positions: fixed 2-d sine-cosine positions of a ViT; False: learned ones.
        mean, std, attention, mlp, block: as of ``Supervised``; of the momentum encoder, too.

    Example::

        model = MoCoV3.from_timm("vit_tiny_patch16_224", img_size=64, depth=2, mlp_dim=1024, out_dim=128)
        first_views, second_views = torch.randn(2, 2, 3, 64, 64)
        model.follow(0.99)
        model((first_views, second_views)).loss.backward()

    Source: arXiv:2104.02057 and its code.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        temperature: float = 0.2,
        mlp_dim: int = 4096,
        out_dim: int = 256,
        stop_grad_conv1: bool = True,
        sincos_positions: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        attention: str = "mimkernels",
        mlp: str = "mimkernels",
        block: str = "mimkernels",
    ) -> None:
        super().__init__()
        self._family = family_of(encoder)
        check_computed_by(attention=attention, mlp=mlp, block=block)
        check_integers(mlp_dim=mlp_dim, out_dim=out_dim)
        check_numbers(temperature=temperature)
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        for name, width in (("mlp_dim", mlp_dim), ("out_dim", out_dim)):
            if width < 1:
                raise ValueError(f"{name} must be at least 1, got {width}")
        self._set_encoder(encoder)
        self.temperature = temperature
        self._set_pixel_statistics(mean, std)
        if stop_grad_conv1:
            self.encoder.patch_embed.proj.requires_grad_(False)
        if sincos_positions and self._family is ViT and self.encoder.pos_embed is not None:
            self.encoder.pos_embed.requires_grad_(False)
        self.projector = _mlp(self.encoder.num_features, mlp_dim, mlp_dim, out_dim)
        self.predictor = _mlp(out_dim, mlp_dim, out_dim)
        compute_by(encoder, attention=attention, mlp=mlp, block=block)
        self.momentum_encoder: Any = copy_without_gradients(self.encoder)
        self.momentum_projector = copy_without_gradients(self.projector)

    @classmethod
    def from_timm(
        cls,
        name: str,
        *,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        patch_size: int | Sequence[int] | None = None,
        temperature: float = 0.2,
        mlp_dim: int = 4096,
        out_dim: int = 256,
        stop_grad_conv1: bool = True,
        sincos_positions: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        attention: str = "mimkernels",
        mlp: str = "mimkernels",
        block: str = "mimkernels",
        **timm_kwargs: Any,
    ) -> "MoCoV3":
        """A new model around the timm encoder `name`, a ViT initialised as published, others as ``SimMIM`` does.

        Args:
            name: a timm ``vit_*``, ``beit_*``, ``swin_*`` or ``swinv2_*``.
            img_size: pixels per side, or ``(height, width)``.
            in_chans: channels of the images.
            patch_size: pixels per patch side, or ``(height, width)``; None takes the model's own.
            timm_kwargs: further arguments of the timm model. With ``pretrained=True`` or ``checkpoint_path`` the
                encoder keeps those weights and positions.

        The other arguments are those of the class.

        Raises:
            ValueError: the name is unknown, or the model or an argument is not supported; says what and why.
        """
        encoder = create_masked_encoder(
            name, img_size=img_size, in_chans=in_chans, patch_size=patch_size, **timm_kwargs
        )
        own: dict[str, Any] = {
            "temperature": temperature,
            "mlp_dim": mlp_dim,
            "out_dim": out_dim,
            "stop_grad_conv1": stop_grad_conv1,
            "sincos_positions": sincos_positions,
            "mean": mean,
            "std": std,
            "attention": attention,
            "mlp": mlp,
            "block": block,
        }
        shape = {"img_size": img_size, "in_chans": in_chans, "patch_size": patch_size}
        family = family_of(encoder)

        def init(fresh: Any) -> None:
            if family is ViT:
                _init_vit(fresh, sincos_positions)
            else:
                family.init(fresh)

        return cls._initialised(encoder, init, name, shape, own, timm_kwargs)

    @property
    def blocks(self) -> list[nn.Module]:
        """The encoder's transformer blocks, in their order, then those of the momentum encoder."""
        return [*self._family.blocks(self.encoder), *self._family.blocks(self.momentum_encoder)]

    def follow(self, momentum: float) -> None:
        """Move the momentum encoder and its projector to ``momentum`` of themselves and the rest of what is trained."""
        follow(self.momentum_encoder, self.encoder, momentum)
        follow(self.momentum_projector, self.projector, momentum)

    def forward(self, views: Sequence[Tensor], *, head_stats: Sequence[str] = ()) -> MoCoV3Output:
        """Queries of both views against each other's keys.

        Args:
            views: two batches ``[B, C, H, W]`` of the same images, uint8 (with the model's mean and std) or floating
                point. All processes have as many images.
            head_stats: statistics of ``mimkernels.attention`` to return for every encoder block, over all patches of
                both views; distances are in patches. They carry gradients: terms of them can be added to the loss.

        Raises:
            ValueError, TypeError: the views do not fit the model or each other; the message shows both sides. Or the
                encoder's attention cannot record statistics.
        """
        images = self._joined(views)
        with self._recorded(images, head_stats) as heads:
            features = self._features(self.encoder, images)
        layer_stats = [layer.stats for layer in heads] if head_stats else None
        # The norms of projector and predictor take their statistics from one view at a time.
        q1, q2 = (self.predictor(self.projector(view)) for view in features.chunk(2))
        with torch.no_grad():
            k1, k2 = (self.momentum_projector(view) for view in self._features(self.momentum_encoder, images).chunk(2))
        loss = self._contrast(q1, k2) + self._contrast(q2, k1)
        return MoCoV3Output(loss, {"feature_std": feature_std(features)}, layer_stats)

    def load_checkpoint(self, source: str | os.PathLike | Mapping[str, Any]) -> CheckpointReport:
        """Load weights under their published names, all of them or none.

        Args:
            source: a file or dict: the names, or ``{"state_dict": {...}}`` or ``{"model": {...}}`` of them, with or
                without ``module.`` before each.

        Raises:
            ValueError: another architecture (lists names and shapes of both sides), or not a file of tensors.
        """
        mapping = isinstance(source, Mapping)
        content: Any = source if mapping else read_file(source)  # type: ignore[arg-type] # a path
        if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
            content = content["state_dict"]
        weights = weights_of(content, "the checkpoint" if mapping else repr(os.fspath(source)))  # type: ignore[arg-type]
        ours = {name.removeprefix("module."): tensor for name, tensor in self.mocov3_state_dict().items()}
        return copy_by_name(ours, weights, title=self._title())

    def mocov3_state_dict(self) -> dict[str, Tensor]:
        """The weights under their published names; they share this model's memory."""
        published = {}
        for name, tensor in self.state_dict().items():
            ours = next(prefix for prefix in _PUBLISHED if name.startswith(prefix))
            published[f"module.{_PUBLISHED[ours]}{name.removeprefix(ours)}"] = tensor
        return published

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass."""
        self.encoder.set_grad_checkpointing(enable)

    def _features(self, encoder: nn.Module, images: Tensor) -> Tensor:
        return represent(encoder, images, self._pixel_mean, self._pixel_std)

    def _contrast(self, q: Tensor, k: Tensor) -> Tensor:
        """``2 T`` times the cross-entropy of each query's own key among those of all processes."""
        with torch.autocast(q.device.type, enabled=False):
            exact = torch.promote_types(q.dtype, torch.float32)
            q, k = (nn.functional.normalize(rows.to(exact), dim=1) for rows in (q, k))
            own = torch.arange(q.shape[0], device=q.device)
            if self.training:
                k = gather(k)
                own = own + q.shape[0] * _rank()
            logits = q @ k.T / self.temperature  # [B, P * B]
            return nn.functional.cross_entropy(logits, own) * (2 * self.temperature)

    def _joined(self, views: Sequence[Tensor]) -> Tensor:
        """Both views as one batch ``[2 B, C, H, W]``."""
        if not isinstance(views, (tuple, list)):
            raise TypeError(f"views must be a tuple of two batches of images, got {type(views).__name__}")
        if len(views) != 2:
            raise ValueError(f"views must be two batches of the same images, got {len(views)}")
        for view in views:
            self._check_images(view)
        first, second = views
        if first.shape != second.shape or first.dtype != second.dtype:
            raise ValueError(
                f"both views must be of the same images, got {list(first.shape)} {first.dtype} and "
                f"{list(second.shape)} {second.dtype}"
            )
        return torch.cat((first, second))


def _mlp(*widths: int) -> nn.Sequential:
    """Linear layers without bias, each with a norm over the batch: ReLU between, no affine map behind the last."""
    layers: list[nn.Module] = []
    for number, (inner, outer) in enumerate(itertools.pairwise(widths), 2):
        layers.append(nn.Linear(inner, outer, bias=False))
        if number < len(widths):
            layers += [nn.BatchNorm1d(outer), nn.ReLU(inplace=True)]
        else:
            layers.append(nn.BatchNorm1d(outer, affine=False))
    return nn.Sequential(*layers)


@torch.no_grad()
def _init_vit(encoder: Any, sincos_positions: bool) -> None:
    """Initialise as published: Xavier, of queries, keys and values each as a matrix of its own."""
    for name, part in encoder.named_modules():
        if isinstance(part, nn.Linear):
            outputs = part.out_features // (3 if name.endswith("qkv") else 1)
            bound = math.sqrt(6 / (outputs + part.in_features))
            nn.init.uniform_(part.weight, -bound, bound)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    if encoder.cls_token is not None:
        nn.init.normal_(encoder.cls_token, std=1e-6)
    embed = encoder.patch_embed
    bound = math.sqrt(6 / (math.prod(embed.proj.weight.shape[1:]) + embed.proj.out_channels))
    nn.init.uniform_(embed.proj.weight, -bound, bound)
    if embed.proj.bias is not None:
        nn.init.zeros_(embed.proj.bias)
    if sincos_positions and encoder.pos_embed is not None:
        num_prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
        by_column, by_row = sincos_positions_2d(encoder.embed_dim, embed.grid_size, num_prefix).chunk(2, dim=-1)
        encoder.pos_embed.copy_(torch.cat((by_row, by_column), dim=-1))  # published: row first


def _rank() -> int:
    return torch.distributed.get_rank() if distributed() else 0
