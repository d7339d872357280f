"""SimMIM's weights under their published names and in their published layout, and back; published files into models."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mimkernels.models.checkpoint import CheckpointReport, check_by_name
from mimkernels.models.windows import FormerWindows, resize_tables

__all__ = ["from_published", "load_published", "published_buffers", "split_published", "to_published"]

# What published modules save though it follows from the architecture.
_DERIVED = ("relative_position_index", "relative_coords_table", "attn_mask")
_DOWNSAMPLE = re.compile(r"^encoder\.layers\.(\d+)\.downsample\.")
_HEADS = ("encoder.head.", "encoder.lm_head.")
_RENAMED = {"mask_token": "encoder.mask_token", "decoder.weight": "decoder.0.weight", "decoder.bias": "decoder.0.bias"}


def to_published(weights: Mapping[str, Tensor], stride: tuple[int, int]) -> dict[str, Tensor]:
    """Weights of ``SimMIM`` by their published names.

    The decoder is a 1x1 convolution before a pixel shuffle there: its output channels are (colour, row, column), those
    of our linear layer (row, column, colour). It is copied; the other tensors are those given.
    """
    published = {}
    for name, tensor in weights.items():
        if name in ("decoder.weight", "decoder.bias"):
            tensor = tensor.unflatten(0, (*stride, -1)).movedim(2, 0).flatten(0, 2)
            tensor = tensor[..., None, None] if name == "decoder.weight" else tensor
        published[_moved_stage(_RENAMED.get(name, name), -1)] = tensor
    return published


def from_published(weights: Mapping[str, Tensor], stride: tuple[int, int]) -> dict[str, Tensor]:
    """The inverse of ``to_published``."""
    named = {new: old for old, new in _RENAMED.items()}
    ours = {}
    for name, tensor in weights.items():
        name = named.get(_moved_stage(name, 1), _moved_stage(name, 1))
        if name in ("decoder.weight", "decoder.bias"):
            tensor = tensor.flatten(1) if name == "decoder.weight" else tensor
            tensor = tensor.unflatten(0, (-1, *stride)).movedim(0, 2).flatten(0, 2)
        ours[name] = tensor
    return ours


def published_buffers(encoder: nn.Module) -> dict[str, Tensor]:
    """What published modules save besides weights, by published name."""
    return {
        f"encoder.{name}": buffer for name, buffer in encoder.named_buffers() if name.rpartition(".")[2] in _DERIVED
    }


def split_published(
    weights: Mapping[str, Tensor], stride: tuple[int, int]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of a file by their published names, and what else is in it: that no weight of ours has.

    Takes the published names, with and without ``encoder.``, those of ``SimMIM.state_dict()``, and for Swin those of
    timm, whose stages begin with the merging of patches that the published ones end with.
    """
    if "decoder.weight" in weights or {"decoders.0.weight", "mask_token"} <= weights.keys():
        named = to_published(weights, stride)
    else:
        bare = not any(name.startswith("encoder.") for name in weights)
        named = {
            f"encoder.{name}" if bare and not _is_decoder(name) else name: tensor for name, tensor in weights.items()
        }
        stages = {int(match[1]) for name in named if (match := _DOWNSAMPLE.match(name))}
        if stages and 0 not in stages:
            named = {_moved_stage(name, -1): tensor for name, tensor in named.items()}
    left = {
        name: tensor for name, tensor in named.items() if name.startswith(_HEADS) or name.rpartition(".")[2] in _DERIVED
    }
    return {name: tensor for name, tensor in named.items() if name not in left}, left


def load_published(
    weights: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    encoder: nn.Module,
    stride: tuple[int, int],
    *,
    title: str,
    config: dict[str, Any] | None = None,
) -> CheckpointReport:
    """Copy published weights by name, windows resized as published; all of them or none.

    Args:
        weights: the checkpoint's.
        own: what is written to: the tensors of ``SimMIM``, or of its encoder alone, each name after ``encoder.``.
        encoder: the timm model that `own` is of.
        stride: pixels per output token.
        title: what the model is, for the refusal.
        config: settings that the model is built anew from, to which former windows of Swin V2 are added.

    Raises:
        ValueError: as ``SimMIM.load_checkpoint``.
    """
    weights, left = split_published(weights, stride)
    if not any(_is_decoder(name) for name in own):
        left |= {name: weights.pop(name) for name in list(weights) if _beyond_encoder(name)}
    encoder_only = not any(_is_decoder(name) for name in weights)
    weights, resized = resize_tables(weights, encoder)
    former = FormerWindows(left, encoder)
    published = to_published(own, stride)
    missing = check_by_name(
        published, weights, title=title, optional=lambda name: encoder_only and _beyond_encoder(name)
    )
    with torch.no_grad():
        for name, tensor in from_published(weights, stride).items():
            own[name].copy_(tensor)
    resized += former.told()
    former.apply(config)
    loaded = tuple(name for name in published if name in weights)
    return CheckpointReport(loaded, tuple(missing), tuple(left), tuple(resized))


def _beyond_encoder(name: str) -> bool:
    return _is_decoder(name) or name == "encoder.mask_token"


def _moved_stage(name: str, by: int) -> str:
    return _DOWNSAMPLE.sub(lambda match: f"encoder.layers.{int(match[1]) + by}.downsample.", name)


def _is_decoder(name: str) -> bool:
    return name.startswith(("decoder.", "decoders."))  # the latter of several targets
