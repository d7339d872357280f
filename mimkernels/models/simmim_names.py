"""SimMIM's weights under their published names and in their published layout, and back."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["check_windows", "from_published", "published_buffers", "split_published", "to_published"]

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


def split_published(weights: Mapping[str, Tensor], stride: tuple[int, int]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of a file by their published names, and the names in the file that no weight of ours has.

    Takes the published names, with and without ``encoder.``, those of ``SimMIM.state_dict()``, and for Swin those of
    timm, whose stages begin with the merging of patches that the published ones end with.
    """
    if "decoder.weight" in weights:
        named = to_published(weights, stride)
    else:
        bare = not any(name.startswith("encoder.") for name in weights)
        named = {
            f"encoder.{name}" if bare and not _is_decoder(name) else name: tensor for name, tensor in weights.items()
        }
        stages = {int(match[1]) for name in named if (match := _DOWNSAMPLE.match(name))}
        if stages and 0 not in stages:
            named = {_moved_stage(name, -1): tensor for name, tensor in named.items()}
    left = [name for name in named if name.startswith(_HEADS) or name.rpartition(".")[2] in _DERIVED]
    return {name: tensor for name, tensor in named.items() if name not in left}, left


def check_windows(weights: Mapping[str, Tensor], encoder: nn.Module, stride: tuple[int, int]) -> None:
    """Raise ValueError if what a file holds besides weights shows that it is of another window; shows both sides.

    Raises:
        ValueError: names the buffer, the window of the checkpoint and the model's.
    """
    buffers = published_buffers(encoder)
    prefix = "" if any(name.startswith("encoder.") for name in weights) else "encoder."
    for name, tensor in weights.items():
        ours = buffers.get(f"{prefix}{name}")
        if ours is None or name.endswith("attn_mask") or tensor.shape == ours.shape:
            continue
        windows = tuple(_window_of(name, shape.shape) for shape in (tensor, ours))
        raise ValueError(
            f"the checkpoint is of another window: {windows[0]} in the checkpoint, {windows[1]} in the model ({name}: "
            f"{list(tensor.shape)} and {list(ours.shape)}); nothing was loaded. Build the model with that window_size"
        )


def _window_of(name: str, shape: torch.Size) -> str:
    if name.endswith("relative_coords_table") and len(shape) == 4:
        return f"{(shape[1] + 1) // 2} x {(shape[2] + 1) // 2} tokens"
    side = round(shape[0] ** 0.5) if len(shape) else 0
    return f"{side} x {side} tokens" if side * side == shape[0] else f"{shape[0]} tokens"


def _moved_stage(name: str, by: int) -> str:
    return _DOWNSAMPLE.sub(lambda match: f"encoder.layers.{int(match[1]) + by}.downsample.", name)


def _is_decoder(name: str) -> bool:
    return name.startswith("decoder.")
