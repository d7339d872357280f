"""The teacher whose features ``--target features:MODEL`` and ``--target ema`` predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mimkernels.commands.pretrain.config import NO_MASKING, PretrainConfig
from mimkernels.commands.pretrain.teacher import TeacherEncoder
from mimkernels.engine.encoder import FrozenEncoder, load_encoder
from mimkernels.engine.model_names import ModelChoice
from mimkernels.models.momentum import half_cosine
from mimkernels.models.targets import FeatureTarget, parse_target

__all__ = ["FeatureTeacher", "load_teacher"]

_EPS = 1e-5


def load_teacher(config: PretrainConfig) -> FrozenEncoder | None:
    """The encoder that ``--target features:MODEL`` names; None of other targets.

    A run or checkpoint has images of its own size; of a timm name it is that of the run, in whole patches.
    """
    target = parse_target(config.target).features
    if target is None or target.model is None:
        return None
    try:
        encoder = load_encoder(ModelChoice(target.model, target.model))
        patch = getattr(getattr(encoder.model, "patch_embed", None), "patch_size", None)
        if not Path(target.model).exists() and patch is not None:
            side = int(patch[0])
            size = max(1, round(config.img_size / side)) * side
            if size != encoder.img_size:
                encoder = load_encoder(ModelChoice(target.model, target.model, img_size=size))
    except ValueError as e:
        raise ValueError(f"target {config.target!r}: {e}") from e
    return encoder


class FeatureTeacher(TeacherEncoder):
    """Features of a teacher without gradients, at the output tokens of the model that learns to predict them.

    Args:
        config: ``target``, ``momentum`` and the size of the images are read.
        model: what is trained, with an ``encoder`` of timm.
        encoder: what ``load_teacher`` gives; None takes the moving average of the trained encoder.

    Raises:
        ValueError: the teacher gives no grid of patches, no such blocks, or takes other channels; shows both sides.
    """

    def __init__(self, config: PretrainConfig, model: Any, encoder: FrozenEncoder | None) -> None:
        target = parse_target(config.target).features
        assert target is not None
        self.target, self.momentum = target, config.value("momentum")
        self._hides = config.masking != NO_MASKING
        self._masked_ids = getattr(model, "masked_ids", None)
        self._mask_grid: tuple[int, int] = tuple(model.grid_size)
        stride = getattr(model, "encoder_stride", model.patch_size)
        self.grid = (config.img_size // stride[0], config.img_size // stride[1])
        super().__init__(config, model, encoder)
        encoder = self.encoder
        self._blocks = self._chosen(target, config.target)
        if encoder.grid is None:
            raise ValueError(f"target {config.target!r}: {encoder.title} gives no grid of patches")
        if encoder.in_chans not in (config.in_chans, 3):
            raise ValueError(
                f"target {config.target!r} takes images of {encoder.in_chans} channels, the model of {config.in_chans}"
            )

    @property
    def told(self) -> str:
        """The target in words."""
        target = self.target
        if target.layers is not None:
            where = f"mean of the last {len(self._blocks)} blocks, each normalised"
        else:
            where = f"block {self._blocks[0]}" if self._blocks else "last layer"
        norm = {"ln": "LayerNorm without gain", "instance": "normalised over each image's tokens", "none": "as it is"}
        rows, columns = self.encoder.grid or (0, 0)
        grid = "" if (rows, columns) == self.grid else f", resampled from {rows} x {columns} tokens"
        return f"features of {self.named}: {where}, {norm[target.norm]}; {target.loss} on {target.tokens} tokens{grid}"

    def arguments(self, images: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """What a step calls the model with, in addition to `images` and to what masks them."""
        given: dict[str, Any] = {"features": self.features(images)}
        if not self._hides:
            given["mask"] = torch.zeros(len(images), *self._mask_grid, dtype=torch.bool, device=images.device)
        elif mask is not None and self.target.tokens == "masked" and self._masked_ids is not None:
            # Found where the mask lies: one on the CPU makes nobody wait for the device.
            given["ids"] = self._masked_ids(mask).to(images.device, non_blocking=True)
        return given

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """``[B, L, D]`` of uint8 `images`: those of every output token, not yet normalised by LayerNorm."""
        encoder = self.encoder.to(images.device)
        pixels = images
        if encoder.in_chans == 3 and images.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        side = encoder.img_size
        if tuple(pixels.shape[2:]) != (side, side):
            pixels = F.interpolate(pixels.float(), (side, side), mode="bilinear", antialias=True)
        tokens = self._tokens(pixels)  # [B, N, D]
        if self.target.norm == "instance":
            variance, mean = torch.var_mean(tokens, 1, keepdim=True, correction=0)
            tokens = (tokens - mean) / (variance + _EPS).sqrt()
        if encoder.grid != self.grid:
            assert encoder.grid is not None
            maps = tokens.transpose(1, 2).unflatten(2, encoder.grid)
            tokens = F.interpolate(maps, self.grid, mode="bilinear").flatten(2).transpose(1, 2)
        kind = images.device.type
        return tokens.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tokens

    def follow(self, share: float) -> None:
        """To be called after each optimizer step, after `share` of the training."""
        self.move(half_cosine(self.momentum, 1.0, share))

    def _chosen(self, target: FeatureTarget, text: str) -> list[int]:
        """Numbers of the blocks whose outputs are read; none for what the encoder gives."""
        if target.layer == -1 and target.layers is None:
            return []
        depth = len(getattr(self.encoder.model, "blocks", ()))
        last = target.layer + depth if target.layer < 0 else target.layer
        if not 0 <= last < depth:
            raise ValueError(f"target {text!r} wants block {target.layer}, {self.encoder.title} has {depth} blocks")
        return list(range(max(0, last + 1 - (target.layers or 1)), last + 1))

    def _tokens(self, pixels: Tensor) -> Tensor:
        encoder = self.encoder
        if not self._blocks:
            return encoder(pixels).tokens[:, encoder.num_prefix :]
        outputs: list[Tensor] = []
        blocks: Any = encoder.model.blocks
        hooks = [blocks[i].register_forward_hook(lambda _, __, out: outputs.append(out)) for i in self._blocks]
        try:
            encoder(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        rows = [out[:, encoder.num_prefix :].float() for out in outputs]
        if self.target.layers is None:
            return rows[0]
        return torch.stack([F.layer_norm(each, each.shape[-1:], eps=_EPS) for each in rows]).mean(0)
