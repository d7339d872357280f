"""Checks that several ops share. Every refusal names the op and the argument and shows both sides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mimkernels.ops._registry import ANY_FLOAT


def is_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


def has_rank(op: str, name: str, tensor: Tensor, *ranks: int) -> None:
    is_tensor(op, name, tensor)
    if tensor.dim() not in ranks:
        wanted = " or ".join(map(str, ranks))
        raise ValueError(f"{op}: {name} must have {wanted} dimensions, got {tensor.dim()} ({shape(tensor)})")


def is_float(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in ANY_FLOAT:
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {tensor.dtype}")


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


def in_range(op: str, name: str, ids: Tensor, size: int) -> None:
    """For the reference on CPU tensors; kernels check for themselves. On CUDA it would wait for the device."""
    if torch.compiler.is_compiling() or ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(ids))
    if low < 0 or high >= size:
        raise IndexError(f"{op}: {name} holds {low if low < 0 else high}, outside [0, {size})")


def keep_count(op: str, keep: int, tokens: int) -> None:
    if not isinstance(keep, (int, torch.SymInt)) or isinstance(keep, bool):
        raise TypeError(f"{op}: keep must be an int, got {type(keep).__name__}")
    if keep <= 0:
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
    if isinstance(patch_size, (int, torch.SymInt)):
        patch = (patch_size,) * (3 if frames else 2)
    else:
        patch = tuple(patch_size)
    if len(patch) != images.dim() - 2:
        wanted = "(frames, height, width)" if frames else "(height, width)"
        raise ValueError(f"{op}: patch_size must be an int or {wanted} for images {shape(images)}, got {patch}")
    for name, size, length in zip(("frames", "height", "width")[-len(patch) :], patch, images.shape[2:], strict=True):
        if size <= 0:
            raise ValueError(f"{op}: patch_size must be positive, got {patch}")
        if length % size:
            raise ValueError(f"{op}: patch {name} {size} does not divide the image {name} {length} ({shape(images)})")
    return patch if frames else (1, *patch)


def normalisation(
    op: str, images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift ``[C]`` fp32 so that ``pixel * scale + shift`` is the normalised pixel.

    ``mean`` and ``std`` speak of pixels in [0, 1]; uint8 pixels are divided by 255 first and so need both.
    """
    if (mean is None) != (std is None):
        given, missing = ("mean", "std") if std is None else ("std", "mean")
        raise ValueError(f"{op}: {given} is given but {missing} is None; give both or neither")
    if mean is None:
        if images.dtype == torch.uint8:
            raise ValueError(f"{op}: uint8 images need mean and std (sequences of {images.shape[1]} floats)")
        return None, None
    device, channels = images.device, images.shape[1]
    mean = torch.as_tensor(mean, dtype=torch.float32, device=device)
    std = torch.as_tensor(std, dtype=torch.float32, device=device)
    for name, value in (("mean", mean), ("std", std)):
        if tuple(value.shape) != (channels,):
            raise ValueError(f"{op}: {name} has shape {shape(value)} but the images have {channels} channels")
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    return 1.0 / (std * unit), -mean / std


def shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
