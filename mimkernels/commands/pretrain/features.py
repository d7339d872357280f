"""The teacher whose features ``--target features:MODEL``, ``--target ema`` and ``--target bootstrap`` predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimkernels.commands.pretrain.config import NO_MASKING, PretrainConfig
from mimkernels.commands.pretrain.methods.feature_targets import stages_of
from mimkernels.commands.pretrain.teacher import Autocast, TeacherEncoder, full_precision
from mimkernels.data.batches import derived_seed, drawing_from
from mimkernels.engine.encoder import FrozenEncoder, load_same_encoder
from mimkernels.engine.model_names import ModelChoice
from mimkernels.models.build import build_model
from mimkernels.models.momentum import half_cosine
from mimkernels.models.target_sum import TargetSum
from mimkernels.models.targets import FeatureTarget, parse_target, parse_targets

__all__ = ["FeatureReader", "FeatureTeacher", "FeatureTeachers", "load_teacher", "load_teachers"]

_EPS = 1e-5
_STAGES = 7  # stream of the seed; the others are in data/batches.py, engine/training/loop.py and validation.py
_KEPT = "encoder.patch_embed.proj.bias"  # from stage to stage


class FeatureReader:
    """Patch features of an encoder at the layers that a target names, before they are normalised.

    Args:
        encoder: gives the features.
        target: which ones.
        text: of the target, for refusals.

    Attributes:
        grid, dim: rows and columns of the patches, and the width of their features.

    Raises:
        ValueError: the encoder has no such blocks, or gives no grid of patches; shows both sides.
    """

    def __init__(self, encoder: FrozenEncoder, target: FeatureTarget, text: str) -> None:
        self.encoder, self.target = encoder, target
        self.numbers: list[int] = []  # of the blocks that are read; none: what the encoder gives
        self._blocks: list[nn.Module] = []
        self._parts: list[nn.Module] = []
        if target.layer != -1 or target.layers is not None or target.part != "block":
            self._choose(text)
        blank = torch.zeros(1, encoder.in_chans, encoder.img_size, encoder.img_size, dtype=torch.uint8)
        tokens, grid = self._read(blank)
        if grid is None:
            raise ValueError(f"target {text!r}: {encoder.title} gives no grid of patches")
        self.grid, self.dim = grid, tokens.shape[2]

    def __call__(self, pixels: Tensor) -> Tensor:
        """``[B, N, D]`` fp32 of images ``[B, C, S, S]`` as the encoder takes them; the mean over several blocks."""
        return self._read(pixels)[0]

    @property
    def told(self) -> str:
        """The layers in words."""
        target, numbers = self.target, self.numbers
        mlps = target.part == "mlp"
        if not numbers:
            return "last layer"
        if len(numbers) == 1:
            alone = "" if target.layers is None else ", normalised"
            return f"{'MLP of ' if mlps else ''}block {numbers[0]}{alone}"
        which = f"the last {len(numbers)} blocks" if target.layer == -1 else f"blocks {numbers[0]} to {numbers[-1]}"
        return f"mean of {'the MLPs of ' if mlps else ''}{which}, each normalised"

    def _choose(self, text: str) -> None:
        target, stages = self.target, self.encoder.stages
        blocks = [block for stage in stages for block in stage]
        depth = len(blocks)
        last = target.layer + depth if target.layer < 0 else target.layer
        if not 0 <= last < depth:
            raise ValueError(
                f"target {text!r} wants block {target.layer}, {self.encoder.title} has {depth} blocks"
                + (f", 0 to {depth - 1}" if depth else "")
            )
        # Those of other stages have other widths and grids.
        first, begins = last + 1 - (target.layers or 1), 0
        for stage in stages:
            if begins <= last < begins + len(stage):
                first = max(first, begins)
            begins += len(stage)
        self.numbers = list(range(first, last + 1))
        self._blocks = [blocks[number] for number in self.numbers]
        if target.part == "mlp":
            # Behind LayerScale, where a block has it.
            parts = [block._modules.get("drop_path2") for block in self._blocks]
            self._parts = [part for part in parts if part is not None]
            if len(self._parts) < len(self._blocks):
                kind = type(self._blocks[0]).__name__
                raise ValueError(f"target {text!r}: part=mlp reads the MLPs of timm's blocks, {kind} has none to read")

    def _read(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int] | None]:
        encoder = self.encoder
        if not self._blocks:
            return encoder(pixels).tokens[:, encoder.num_prefix :], encoder.grid
        outputs: list[Tensor] = []
        parts: list[Tensor] = []
        hooks = [block.register_forward_hook(lambda _, __, out: outputs.append(out)) for block in self._blocks]
        hooks += [part.register_forward_hook(lambda _, __, out: parts.append(out)) for part in self._parts]
        try:
            encoder(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        grid = encoder.grid
        if outputs[0].dim() == 4:  # Swin's maps
            grid = outputs[0].shape[1], outputs[0].shape[2]
        rows = [out.flatten(1, -2)[:, encoder.num_prefix :].float() for out in parts or outputs]
        if self.target.layers is None:
            return rows[0], grid
        mean = torch.stack([F.layer_norm(each, each.shape[-1:], eps=_EPS) for each in rows]).mean(0)
        return mean, grid


def load_teachers(config: PretrainConfig) -> list[FeatureReader | None]:
    """``load_teacher`` of every target that is features; an encoder that several of them name is loaded once."""
    loaded: dict[str, FrozenEncoder] = {}
    return [load_teacher(config, term.text, loaded) for term in parse_targets(config.target) if term.target.features]


def load_teacher(
    config: PretrainConfig, text: str, loaded: dict[str, FrozenEncoder] | None = None
) -> FeatureReader | None:
    """The encoder that target `text`, ``features:MODEL``, names; None of others. Random weights are the same always.

    A run or checkpoint has images of its own size; of a timm name it is that of the run, in whole tokens. The target's
    ``img_size`` comes before both.

    Args:
        loaded: encoders by what asks for them; one of them is taken where it is the same, a new one added.

    Raises:
        ValueError: there is no such model, or it gives no such features.
    """
    target = parse_target(text).features
    if target is None or target.model is None:
        return None
    model, known = target.model, {} if loaded is None else loaded

    def load(img_size: int | None) -> FrozenEncoder:
        named = ModelChoice(model, model, target.arch, dict(target.model_kwargs), target.pretrained, img_size)
        if repr(named) not in known:
            known[repr(named)] = load_same_encoder(named)
        return known[repr(named)]

    try:
        encoder = load(target.img_size)
        if target.img_size is None and not Path(model).exists() and encoder.grid is not None:
            stride = encoder.img_size // encoder.grid[0]
            size = max(1, round(config.img_size / stride)) * stride
            if size != encoder.img_size:
                encoder = load(size)
    except ValueError as e:
        raise ValueError(f"target {text!r}: {e}") from e
    return FeatureReader(encoder, target, text)


class FeatureTeacher(TeacherEncoder):
    """Features of a teacher without gradients, at the output tokens of the model that learns to predict them.

    Args:
        config: ``masking``, ``momentum`` and the size of the images are read.
        model: what is trained, with an ``encoder`` of timm.
        text: the target, of a sum one of it.
        width: of the features that the model predicts; None: that of its encoder.
        reader: what ``load_teacher`` gives; None takes a copy of the trained encoder: its moving average, or the one
            of the stage before.
        autocast: enters the precision of the run.

    Raises:
        ValueError: the teacher gives no grid of patches, no such blocks, takes other channels, or has features of
            another width than the model predicts; shows both sides.
    """

    def __init__(
        self,
        config: PretrainConfig,
        model: Any,
        text: str,
        width: int | None,
        reader: FeatureReader | None,
        autocast: Autocast = full_precision,
    ) -> None:
        target = parse_target(text).features
        assert target is not None
        self.target, self.momentum = target, config.value("momentum")
        self._hides = config.masking != NO_MASKING
        self._masked_ids = getattr(model, "masked_ids", None)
        self._mask_grid: tuple[int, int] = tuple(model.grid_size)
        stride = getattr(model, "encoder_stride", model.patch_size)
        self.grid = (config.img_size // stride[0], config.img_size // stride[1])
        super().__init__(config, model, None if reader is None else reader.encoder, autocast)
        self.reader = FeatureReader(self.encoder, target, text) if reader is None else reader
        if self.encoder.in_chans not in (config.in_chans, 3):
            raise ValueError(
                f"target {text!r} takes images of {self.encoder.in_chans} channels, the model of {config.in_chans}"
            )
        predicted = model.encoder.num_features if width is None else width
        if self.reader.dim != predicted:
            raise ValueError(
                f"target {text!r}: features of {self.encoder.title} have {self.reader.dim} values, the model "
                f"predicts {predicted}: give --target-dim {self.reader.dim}"
            )

    @property
    def told(self) -> str:
        """The target in words."""
        target = self.target
        norm = {"ln": "LayerNorm without gain", "instance": "normalised over each image's tokens", "none": "as it is"}
        rows, columns = self.reader.grid
        grid = "" if (rows, columns) == self.grid else f", resampled from {rows} x {columns} tokens"
        return (
            f"features of {self.named}: {self.reader.told}, {norm[target.norm]}; {target.loss} on {target.tokens} "
            f"tokens{grid}"
        )

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
        """``[B, L, D]`` of uint8 `images`: those of every output token, not yet normalised by LayerNorm.

        In bf16 where the run computes in it; of fp16, whose range a block's output may leave, in fp32.
        """
        encoder, grid = self.encoder.to(images.device), self.reader.grid
        pixels = images
        if encoder.in_chans == 3 and images.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        side = encoder.img_size
        if tuple(pixels.shape[2:]) != (side, side):
            pixels = F.interpolate(pixels.float(), (side, side), mode="bilinear", antialias=True)
        with self.autocast():
            tokens = self.reader(pixels)  # [B, N, D]
            kind = images.device.type
            half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
        if self.target.norm == "instance":
            variance, mean = torch.var_mean(tokens, 1, keepdim=True, correction=0)
            tokens = (tokens - mean) / (variance + _EPS).sqrt()
        if grid != self.grid:
            maps = tokens.transpose(1, 2).unflatten(2, grid)
            tokens = F.interpolate(maps, self.grid, mode="bilinear").flatten(2).transpose(1, 2)
        return tokens.bfloat16() if half else tokens

    @property
    def named(self) -> str:
        """The encoder in words."""
        if self.target.stages is None:
            return super().named
        return f"the encoder of the stage before, at first with random weights, in {self.target.stages} stages"

    def follow(self, share: float) -> None:
        """To be called after each optimizer step, after `share` of the training."""
        if self.target.stages is None:
            self.move(half_cosine(self.momentum, 1.0, share))

    def become_student(self) -> None:
        """Take the weights of the trained encoder."""
        self.load(None)


class FeatureTeachers:
    """The teachers of all targets of a run that are features, in their order; a ``TeacherTargets``.

    Args:
        config: ``target``, ``target_dim``, ``masking``, ``momentum`` and the size of the images are read.
        model: what is trained, with an ``encoder`` of timm.
        readers: what ``load_teachers`` gives.
        autocast: enters the precision of the run.

    Raises:
        ValueError: as ``FeatureTeacher``.
    """

    def __init__(
        self,
        config: PretrainConfig,
        model: Any,
        readers: Sequence[FeatureReader | None],
        autocast: Autocast = full_precision,
    ) -> None:
        targets = TargetSum(config.target, config.target_dim)
        self.config, self.model, self.terms = config, model, targets.terms
        self.teachers = {
            place: FeatureTeacher(config, model, self.terms[place].text, width, reader, autocast)
            for place, width, reader in zip(targets.of_features, targets.widths, readers, strict=True)
        }
        # One at most: ``parse_targets`` refuses others.
        self._moving = next((teacher for teacher in self.teachers.values() if teacher.moves), None)

    @property
    def told(self) -> str:
        """The target in words, or the sum."""
        words = [
            self.teachers[place].told if place in self.teachers else term.text for place, term in enumerate(self.terms)
        ]
        if len(words) == 1:
            return words[0]
        return " + ".join(f"{term.weight:g} * ({said})" for term, said in zip(self.terms, words, strict=True))

    @property
    def moves(self) -> bool:
        """Whether a teacher changes while the model learns."""
        return self._moving is not None

    @property
    def identities(self) -> dict[str, str]:
        """Of the teachers that stay as they are, by what they teach: change with the weights."""
        several = len(self.terms) > 1
        return {
            f"{self.terms[place].name} target" if several else "target": identity
            for place, teacher in self.teachers.items()
            if (identity := teacher.identity) is not None
        }

    @property
    def stages(self) -> int:
        """In how many stages the model is trained, each from new weights on."""
        return stages_of(self.config)

    @torch.no_grad()
    def begin_stage(self, number: int) -> str:
        """The trained encoder becomes the teacher, and the model begins anew; returns that in words.

        As published: all weights are drawn again but the bias of the patch projection, which the published
        initialisation leaves out; the optimizer keeps its moments.

        Args:
            number: of the stage; the first is 0 and begins by itself.

        Source: dBOT, arXiv:2209.03917.
        """
        assert self._moving is not None
        self._moving.become_student()
        with drawing_from(derived_seed(self.config.seed, _STAGES, number)):
            fresh = build_model(self.config.to_dict()).state_dict()
        for name, tensor in self.model.state_dict().items():
            if name != _KEPT:
                tensor.copy_(fresh[name])
        return f"stage {number + 1} of {self.stages}: the encoder is the teacher, the model begins anew"

    def arguments(self, images: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """What a step calls the model with, in addition to `images` and to what masks them."""
        given = [teacher.arguments(images, mask) for teacher in self.teachers.values()]
        features = [each.pop("features") for each in given]
        merged = {name: value for each in given for name, value in each.items()}
        return {"features": features[0] if len(features) == 1 else features, **merged}

    def follow(self, share: float) -> None:
        """To be called after each optimizer step, after `share` of the training."""
        if self._moving is not None:
            self._moving.follow(share)

    def state(self) -> dict[str, Tensor] | None:
        """What a checkpoint keeps; None where all stay as they are."""
        return None if self._moving is None else self._moving.state()

    def load(self, state: Mapping[str, Tensor] | None) -> None:
        """Continue from what a checkpoint keeps."""
        if self._moving is not None:
            self._moving.load(state)
