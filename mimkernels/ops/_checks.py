"""Checks that several ops share. Every refusal names the op and the argument and shows both sides."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import is_fake

from mimkernels.ops._registry import ANY_FLOAT

# Options are numbers of fp32 in every kernel: beyond these an eps would be 0 there, and a scale infinite.
LEAST = 2.0**-149
LARGEST = torch.finfo(torch.float32).max
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def is_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be a dense tensor, got a tensor of layout {layout}")


def has_rank(op: str, name: str, tensor: Tensor, *ranks: int) -> None:
    is_tensor(op, name, tensor)
    if tensor.dim() not in ranks:
        wanted = " or ".join(map(str, ranks))
        raise ValueError(f"{op}: {name} must have {wanted} dimensions, got {tensor.dim()} ({shape(tensor)})")


def is_float(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in ANY_FLOAT:
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {tensor.dtype}")


def is_real(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.bool, *_INTEGERS, *ANY_FLOAT):
        raise TypeError(f"{op}: {name} must be bool, integer or floating point, got {tensor.dtype}")


def is_pixels(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (*ANY_FLOAT, torch.uint8):
        raise TypeError(f"{op}: {name} must be uint8 or floating point, got {tensor.dtype}")


def same_device(op: str, name: str, tensor: Tensor, main_name: str, main: Tensor) -> None:
    if tensor.device != main.device:
        raise ValueError(f"{op}: {name} is on {tensor.device} but {main_name} is on {main.device}")


def same_size(op: str, name: str, tensor: Tensor, dim: int, main_name: str, main: Tensor, main_dim: int) -> None:
    if tensor.shape[dim] != main.shape[main_dim]:
        raise ValueError(
            f"{op}: {name} {shape(tensor)} has size {tensor.shape[dim]} in dimension {dim} but {main_name} "
            f"{shape(main)} has {main.shape[main_dim]} in dimension {main_dim}"
        )


def token_ids(op: str, name: str, ids: Tensor, ranks: tuple[int, ...], main_name: str, main: Tensor) -> Tensor:
    """Checked ids as int64 with a contiguous last dim."""
    has_rank(op, name, ids, *ranks)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: {name} must be int64 or int32, got {ids.dtype}")
    same_device(op, name, ids, main_name, main)
    return rows(ids.long())


def one_per_image(op: str, name: str, ids: Tensor, main_name: str, main: Tensor) -> None:
    """Ids ``[B, K]`` or ``[M, B, K]`` for the images of ``main``; the message speaks of ``[M, B, K]``."""
    same_size(op, name, as_masks(ids), 1, main_name, main, 0)


def token_mask(op: str, mask: Tensor, main_name: str, main: Tensor) -> Tensor:
    """A mask ``[B, N]`` over the tokens of ``main`` as bool, nonzero = True."""
    has_rank(op, "mask", mask, 2)
    is_real(op, "mask", mask)
    same_device(op, "mask", mask, main_name, main)
    if mask.shape != main.shape[:2]:
        raise ValueError(f"{op}: mask {shape(mask)} and {main_name} {shape(main)} must agree in [B, N]")
    return rows(mask if mask.dtype == torch.bool else mask != 0)


def parameter(op: str, name: str, value: Tensor, rank: int, main_name: str, main: Tensor) -> Tensor:
    """A small parameter without its leading dims of size 1, in the dtype and on the device of ``main``."""
    is_tensor(op, name, value)
    is_float(op, name, value)
    same_device(op, name, value, main_name, main)
    while value.dim() > rank and value.shape[0] == 1:
        value = value.squeeze(0)
    has_rank(op, name, value, rank)
    return rows(value.to(main.dtype))


def as_masks(ids: Tensor) -> Tensor:
    """Ids ``[B, K]`` or ``[M, B, K]`` as ``[M, B, K]``."""
    return ids if ids.dim() == 3 else ids.unsqueeze(0)


def as_video(images: Tensor) -> Tensor:
    """Images ``[B, C, H, W]`` or ``[B, C, T, H, W]`` as ``[B, C, T, H, W]``."""
    return images if images.dim() == 5 else images.unsqueeze(2)


def rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dim is contiguous, a copy elsewhere."""
    if tensor.dim() == 0 or tensor.stride(-1) == 1 or tensor.shape[-1] <= 1:
        return tensor
    return tensor.contiguous()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will want a backward; where it will not, a call goes to the kernel directly."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def without_autocast(tensor: Tensor) -> torch.autocast:
    """For products of a reference, which autocast would round to half precision."""
    device = tensor.device.type
    return torch.autocast("cpu" if device == "meta" else device, enabled=False)  # meta tensors know no autocast


def values_at_hand(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be looked at without a wait: on the CPU; ``MIMKERNELS_DEBUG=1`` waits."""
    if torch.compiler.is_compiling():
        return False
    if tensor.device.type != "cpu" and not (tensor.device.type == "cuda" and debugging()):
        return False
    # Many as one, whose values vmap does not show; or none.
    return not (is_functorch_wrapped_tensor(tensor) or is_fake(tensor))


def debugging() -> bool:
    """Whether values are looked at where that makes the host wait."""
    return os.environ.get("MIMKERNELS_DEBUG", "0") not in ("", "0")


def in_range(op: str, name: str, ids: Tensor, size: int, allowed: int | None = None) -> None:
    """Ids are in ``[0, size)``, or `allowed`. For the reference on CPU tensors; kernels check for themselves.

    On CUDA it would wait for the device.
    """
    if ids.device.type != "cpu" or ids.numel() == 0 or not values_at_hand(ids):
        return
    if allowed is not None:
        ids = ids.masked_fill(ids == allowed, 0)
    low, high = (int(v) for v in torch.aminmax(ids))
    if low < 0 or high >= size:
        raise IndexError(f"{op}: {name} holds {low if low < 0 else high}, outside [0, {size})")


def integer(op: str, name: str, value: int) -> int:
    """An integer that fits 64 bits."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Integral)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{op}: {name} must be below 2^63, got {value}")
    return value


def count(op: str, name: str, value: int) -> None:
    """A non-negative integer."""
    if integer(op, name, value) < 0:
        raise ValueError(f"{op}: {name} must not be negative, got {value}")


def prefix_count(op: str, num_prefix: int, tokens: int, unit: str = "tokens") -> None:
    if not 0 <= integer(op, "num_prefix", num_prefix) <= tokens:
        raise ValueError(f"{op}: num_prefix is {num_prefix} but there are {tokens} {unit}")


def number(op: str, name: str, value: float) -> float:
    """A number that fp32 holds as float."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{op}: {name} gets no gradient but is a tensor that requires one; detach it")
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        made = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{op}: {name} must be a number, got {_text(value)}") from None
    except OverflowError:
        made = math.inf
    if not -math.inf < made < math.inf:
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    if abs(made) > LARGEST:
        raise ValueError(f"{op}: {name} must be at most {LARGEST:.8g}, the largest of fp32, got {value}")
    return made


def positive(op: str, name: str, value: float) -> float:
    """A number that fp32 holds and has above 0 as float."""
    made = number(op, name, value)
    if made <= 0:
        raise ValueError(f"{op}: {name} must be positive, got {value}")
    if made <= LEAST / 2:  # 0 once it is rounded
        raise ValueError(f"{op}: {name} must be at least {LEAST:.8g}, the least of fp32, got {value}")
    return made


def boolean(op: str, name: str, value: bool) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{op}: {name} must be a bool, got {_text(value)}")
    return bool(value)


def _text(value: object) -> str:
    return f"{value!r}" if isinstance(value, (bool, int, float, str)) else type(value).__name__


def keep_count(op: str, keep: int, tokens: int) -> None:
    if integer(op, "keep", keep) <= 0:
        raise ValueError(f"{op}: keep must be at least 1, got {keep}")
    if keep > tokens:
        raise ValueError(f"{op}: keep is {keep} but there are only {tokens} tokens")


def sorted_order(op: str, order: str) -> bool:
    if order not in ("shuffle", "sorted"):
        raise ValueError(f"{op}: order must be 'shuffle' or 'sorted', got {order!r}")
    return order == "sorted"


def is_images(op: str, images: Tensor) -> None:
    """Images ``[B,C,H,W]`` or ``[B,C,T,H,W]``."""
    has_rank(op, "images", images, 4, 5)
    is_pixels(op, "images", images)


def patch_sizes(op: str, patch_size: int | Sequence[int], images: Tensor) -> tuple[int, int, int]:
    """The patch as (frames, height, width), which must divide the images ``[B,C,H,W]`` or ``[B,C,T,H,W]``."""
    frames = images.dim() == 5
    sides = patch_size if isinstance(patch_size, Sequence) else (patch_size,) * (3 if frames else 2)
    patch = tuple(integer(op, "patch_size", side) for side in sides)
    if len(patch) != images.dim() - 2:
        wanted = "(frames, height, width)" if frames else "(height, width)"
        raise ValueError(f"{op}: patch_size must be an int or {wanted} for images {shape(images)}, got {patch}")
    for name, size, length in zip(("frames", "height", "width")[-len(patch) :], patch, images.shape[2:], strict=True):
        if size <= 0:
            raise ValueError(f"{op}: patch_size must be positive, got {patch}")
        if length % size:
            raise ValueError(f"{op}: patch {name} {size} does not divide the image {name} {length} ({shape(images)})")
    time, height, width = patch if frames else (1, *patch)
    return time, height, width


def normalisation(
    op: str, images: Tensor, mean: Sequence[float] | Tensor | None, std: Sequence[float] | Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift ``[C]`` fp32 so that ``pixel * scale + shift`` is the normalised pixel.

    ``mean`` and ``std`` speak of pixels in [0, 1]; uint8 pixels are divided by 255 first and so need both.
    """
    if mean is None and std is None:
        if images.dtype == torch.uint8:
            raise ValueError(f"{op}: uint8 images need mean and std (sequences of {images.shape[1]} floats)")
        return None, None
    if mean is None or std is None:
        given, missing = ("mean", "std") if std is None else ("std", "mean")
        raise ValueError(f"{op}: {given} is given but {missing} is None; give both or neither")
    means, stds = _per_channel(op, "mean", mean, number, images), _per_channel(op, "std", std, positive, images)
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    return 1.0 / (stds * unit), -means / stds


def _per_channel(
    op: str, name: str, values: Sequence[float] | Tensor, check: Callable[[str, str, float], float], images: Tensor
) -> Tensor:
    if isinstance(values, Tensor):  # whose values only the device knows
        is_tensor(op, name, values)
        is_real(op, name, values)
        if values.requires_grad:
            raise TypeError(f"{op}: {name} gets no gradient but is a tensor that requires one; detach it")
    elif not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{op}: {name} must be a sequence of {images.shape[1]} floats, got {values!r}")
    else:
        values = numbers_on([check(op, name, value) for value in values], torch.float32, images.device)
    values = torch.as_tensor(values, dtype=torch.float32, device=images.device)
    if tuple(values.shape) != (images.shape[1],):
        raise ValueError(f"{op}: {name} has shape {shape(values)} but the images have {images.shape[1]} channels")
    return values


def numbers_on(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[len(values)]``: a few numbers of the host on a device, filled in there: to copy them would wait for it."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype, device=device)
    numbers = torch.empty(len(values), dtype=dtype, device=device)
    for place, value in enumerate(values):
        numbers[place : place + 1].fill_(value)
    return numbers


def head_scale(op: str, scale: float | None, dim: int) -> float:
    """The scale of scores that are products of ``dim`` numbers."""
    return max(dim, 1) ** -0.5 if scale is None else number(op, "scale", scale)


def shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
