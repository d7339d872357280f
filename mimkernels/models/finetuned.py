"""Fine-tuning: a pre-trained encoder and a new classifier, each layer at a learning rate of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from timm.models import group_parameters
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mimkernels.models.checkpoint import CheckpointReport
from mimkernels.models.masked_encoders import family_of, readout
from mimkernels.models.simmim_names import load_published, published_buffers
from mimkernels.models.supervised import Supervised, SupervisedOutput
from mimkernels.nn import build_pooling, cls_attention
from mimkernels.nn.attention import attention_layers
from mimkernels.nn.encoder import build_timm, resample_positions
from mimkernels.nn.pooling_choice import parse_pooling
from mimkernels.nn.recorder import LayerRecorder

__all__ = ["READOUTS", "Finetuned", "check_readout"]

READOUTS = ("mean", "cls")  # that timm has, too; others are poolings of ``mimkernels.nn``
_SHARED = "rel_pos_bias.relative_position_bias_table"  # of BEiT


class Finetuned(Supervised):
    """A timm ViT, BEiT, Swin or Swin V2 with a classifier behind a readout of its tokens, for fine-tuning.

    Args:
        encoder: a timm model without head, with the weights it is to start from.
        num_classes: of the labels.
        readout: "mean", the mean of the patch tokens, behind which a ViT or BEiT is normalised anew (``fc_norm``) in
            place of its last norm, as MAE and SimMIM are fine-tuned; "cls", the normalised [cls] token; or a pooling of
            ``mimkernels.nn`` over the normalised tokens, such as ``abmilp:depth=2``.
        head_std: standard deviation of the classifier's first weights. Published are 2e-5 behind a pre-trained ViT or
            BEiT of MAE and SimMIM, and 0.02 behind a Swin and from scratch. Behind 2e-5 random weights hardly learn.
        ema: decay of a moving average of all weights, which is what an evaluated model computes with; 0 for none. It
            begins as a simple average and reaches the decay later (timm's ``ModelEmaV3`` with ``use_warmup``).

    The other arguments are those of ``Supervised``. The loss of a model in eval mode is without label smoothing.

    Example::

        import timm
        from timm.optim import param_groups_layer_decay

        model = Finetuned.from_timm("vit_tiny_patch16_224", num_classes=10, depth=2)
        model.start_from(timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2))
        groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.65)
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        num_classes: int,
        readout: str = "mean",
        head_std: float = 0.02,
        ema: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(encoder, num_classes=num_classes, **options)
        if not 0 < head_std < float("inf"):
            raise ValueError(f"head_std must be a number above 0, got {head_std}")
        if not 0 <= ema < 1:
            raise ValueError(f"ema must be at least 0 and below 1, got {ema}")
        self.readout = readout
        self.fc_norm: nn.Module = nn.Identity()
        self.pooling: nn.Module | None = None
        self._last: list[nn.Module] = []  # attention of the last block, where the readout needs it
        self._maps = hasattr(self.encoder, "layers")  # of Swin, whose last norm stays before the mean
        if readout == "mean":
            if not self._maps:
                self.fc_norm, self.encoder.norm = self.encoder.norm, nn.Identity()
        elif readout == "cls":
            if getattr(self.encoder, "cls_token", None) is None:
                raise ValueError(f"readout 'cls' needs a [cls] token, which {self._title()} has not; take mean")
        else:
            prefix = getattr(self.encoder, "num_prefix_tokens", 0)
            choice = parse_pooling(readout)
            self.pooling = build_pooling(choice.name, self.encoder.num_features, prefix, **choice.options)
            self._last = attention_layers(self.blocks[-1]) if self.pooling.needs_cls_attention else []
            needs_cls = self.pooling.needs_cls_token or self.pooling.needs_cls_attention
            if needs_cls and getattr(self.encoder, "cls_token", None) is None:
                raise ValueError(f"readout {readout!r} needs a [cls] token, which {self._title()} has not")
            if self.pooling.out_dim != self.head.in_features:
                self.head = nn.Linear(self.pooling.out_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=head_std)
        nn.init.zeros_(self.head.bias)
        # After everything else: the average reads and writes weights in the order in which they were made.
        self.average: ModelEmaV3 | None = None
        if ema:
            self.average = ModelEmaV3(self, ema, use_warmup=True)
            self.average.requires_grad_(False)

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
        readout: str = "mean",
        head_std: float = 0.02,
        ema: float = 0.0,
        drop_path_rate: float = 0.1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **timm_kwargs: Any,
    ) -> Finetuned:
        """A new model around the timm encoder `name`, built as timm builds it and initialised as ``SimMIM.from_timm``.

        The arguments are those of the class and of ``Supervised.from_timm``.
        """
        shape: dict[str, Any] = {
            "img_size": img_size,
            "in_chans": in_chans,
            "patch_size": patch_size,
            "drop_path_rate": drop_path_rate,
        }
        encoder = build_timm(name, **shape, **timm_kwargs)
        try:
            family = family_of(encoder)
        except ValueError as error:
            raise ValueError(f"{name!r} cannot be fine-tuned: {error}") from error
        own: dict[str, Any] = {
            "num_classes": num_classes,
            "label_smoothing": label_smoothing,
            "readout": readout,
            "head_std": head_std,
            "ema": ema,
            "mean": mean,
            "std": std,
        }
        return cls._initialised(encoder, family.init, name, shape, own, timm_kwargs)

    @property
    def evaluated_encoder(self) -> nn.Module:
        """The encoder that features are read from when training is over, with the norm that is trained with it."""
        model = self if self.average is None else self.average.module
        encoder = copy.copy(model.encoder)
        if not isinstance(model.fc_norm, nn.Identity):
            encoder._modules = {**encoder._modules, "fc_norm": model.fc_norm}
        return encoder

    def forward(self, images: Tensor, *, targets: Tensor, head_stats: Sequence[str] = ()) -> SupervisedOutput:
        """As ``Supervised.forward``; with a moving average, what that computes where the model is in eval mode."""
        if self.average is not None and not self.training:
            averaged: SupervisedOutput = self.average.module(images, targets=targets, head_stats=head_stats)
            return averaged
        if self._last and head_stats:
            raise ValueError(f"head statistics are not recorded with readout {self.readout!r}, which records the heads")
        return super().forward(images, targets=targets, head_stats=head_stats)

    def classify(self, tokens: Tensor, cls_attention: Tensor | None = None) -> Tensor:
        """Logits ``[B, classes]`` of tokens as ``encode`` gives them.

        Args:
            cls_attention: ``[B, H, N]`` of the last block, for readouts that need it.
        """
        if self.pooling is not None:
            pooled = self.pooling(tokens, cls_attention=cls_attention)
        elif self.readout == "mean":
            pooled = tokens[:, getattr(self.encoder, "num_prefix_tokens", 0) :].mean(1)
        else:
            pooled = readout(self.encoder, tokens)
        logits: Tensor = self.head(self.fc_norm(pooled))
        return logits

    def follow(self, step: int) -> None:
        """Move the average, where there is one, after optimizer step number `step`, counted from 1."""
        if self.average is not None:
            self.average.update(self, step)

    def start_from(self, source: nn.Module) -> CheckpointReport:
        """Copy the weights of a pre-trained encoder of timm, all of them or none.

        As published: positions and tables of relative positions are resampled for other grids and windows, a table that
        all blocks of a BEiT share is copied into each, and where the readout has a norm of its own, the encoder's last
        norm is left out.

        Raises:
            ValueError: `source` is of another architecture; shows both sides.
        """
        encoder, weights = self.encoder, dict(source.state_dict())
        shared = weights.get(_SHARED)
        if shared is not None and encoder.rel_pos_bias is None:
            del weights[_SHARED]
            weights |= {f"blocks.{n}.attn.relative_position_bias_table": shared for n in range(len(encoder.blocks))}
        own_norm = not isinstance(self.fc_norm, nn.Identity)
        if not own_norm and "norm.weight" not in weights:  # timm's, where it pools and then normalises
            weights = {name.replace("fc_norm.", "norm."): tensor for name, tensor in weights.items()}
        left = [n for n in weights if n.startswith(("head.", "fc_norm.")) or (own_norm and n.startswith("norm."))]
        weights = {name: tensor for name, tensor in weights.items() if name not in left}
        resized = []
        table, grid = weights.get("pos_embed"), tuple(encoder.patch_embed.grid_size)
        former: Any = tuple(source.patch_embed.grid_size)  # type: ignore[union-attr, arg-type]
        if table is not None and former != grid:
            prefix = table.shape[1] - former[0] * former[1]
            weights["pos_embed"] = resample_positions(table, (grid[0], grid[1]), former, prefix)
            resized.append(f"pos_embed: {former[0]} x {former[1]} to {grid[0]} x {grid[1]} patches")
        # Tables of windows are resized, and those of Swin V2 scaled by the former windows.
        own = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
        named = {f"encoder.{name}": tensor for name, tensor in weights.items()} | published_buffers(source)
        stride = self._family.stride(encoder)
        copied = load_published(named, own, encoder, stride, title=self._title(), config=self.config)
        resized += copied.resized
        if self.average is not None:
            self.average.set(self)
        loaded = tuple(name.removeprefix("encoder.") for name in copied.loaded)
        return CheckpointReport(loaded, (), tuple(left), tuple(told.removeprefix("encoder.") for told in resized))

    def _logits(self, images: Tensor) -> Tensor:
        if not self._last:
            return super()._logits(images)
        with LayerRecorder(self._last, keep=("q", "k")) as heads:
            tokens = self.encode(images)
        last = heads[-1]
        return self.classify(tokens, cls_attention(last.q, last.k, **last.options))

    def _tokens_read(self) -> int | None:
        return super()._tokens_read() if self.readout == "cls" else None

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, targets, label_smoothing=self.label_smoothing * self.training)

    def layer_ids(self) -> dict[str, int]:
        """The layer of each weight by its name, as published: 0 of patches and positions, i + 1 of block i, one more.

        The last is of all else. They are timm's (``group_matcher``), but for what timm has elsewhere than the published
        code: the encoder's last norm and a table of relative positions that all blocks share belong to the last layer,
        with the classifier, and the merging of patches between two stages to the last block of the former stage.
        """
        last = len(self.blocks) + 1
        of_timm = group_parameters(self.encoder, self.encoder.group_matcher(coarse=False), reverse=True)
        ids = {}
        for name, _ in self.named_parameters():
            inside = name.removeprefix("encoder.")
            if name == inside or inside.startswith(("norm.", "rel_pos_bias.")):
                ids[name] = last
            else:
                ids[name] = of_timm[inside] - (".downsample." in inside)
        return ids

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """For timm's ``param_groups_layer_decay``: ``layer_ids`` as a function of the name."""
        return self.layer_ids().__getitem__

    def no_weight_decay(self) -> set[str]:
        """Names of weights that are not decayed whatever their shape: those of the encoder, by timm."""
        names = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        tables = {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}
        return names | tables

    def freeze(self, layers: int) -> None:
        """Leave the patch embedding, positions and the first `layers` blocks as they are; 0 leaves nothing.

        Raises:
            ValueError: there are fewer blocks.
        """
        blocks = len(self.blocks)
        if not 0 <= layers <= blocks:
            raise ValueError(f"freeze must be 0 to {blocks}, the blocks of {self._title()}, got {layers}")
        ids = self.layer_ids()
        for name, weight in self.named_parameters():
            if layers and ids[name] <= layers:
                weight.requires_grad_(False)

    def timm_state_dict(self) -> dict[str, Tensor]:
        """The evaluated weights under the names of timm's model with a head (``timm_arguments``), sharing memory."""
        model: Any = self if self.average is None else self.average.module
        named = {}
        for name, tensor in model.state_dict().items():
            name = name.removeprefix("encoder.")
            if name.startswith("head.") and self._maps:
                name = f"head.fc.{name.removeprefix('head.')}"
            named[name] = tensor
        return named

    def timm_arguments(self) -> dict[str, Any] | None:
        """What ``timm.create_model`` needs for ``timm_state_dict``; None where timm has no such readout."""
        if self.readout not in READOUTS or self.config is None:
            return None
        own = ("readout", "head_std", "ema", "label_smoothing", "mean", "std", "name")
        arguments = {key: value for key, value in self.config.items() if key not in own and value is not None}
        arguments["global_pool"] = "avg" if self.readout == "mean" else "token"
        return {"model_name": self.config["name"], **arguments}


def check_readout(name: str) -> None:
    """Raise ValueError unless there is such a readout."""
    if name not in READOUTS:
        parse_pooling(name)
