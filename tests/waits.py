"""What would make the host wait for a device, seen without one.

Under ``fake_device()`` tensors on ``"cuda"`` have no data, and every op runs its shape function. That much shows what a
device would be waited for: a value that the host asks for, a shape that depends on values, a copy from the host's
memory to the device or back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Ops whose result, or whose shape, the host can only know from the device.
READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2",
         "bincount", "repeat_interleave", "allclose")  # fmt: skip


class Waits(TorchDispatchMode):
    """Notes in ``found`` every op within that would wait for the device.

    Args:
        host: the CPU stands for the device: a tensor made of Python numbers is a copy to it.
    """

    def __init__(self, host: bool = False) -> None:
        super().__init__()
        self.host = host
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in given if not _is_number(func, tensor)}
        if (name in READS and (self.host or devices != {"cpu"})) or (self.host and name == "lift_fresh"):
            self.found.append(f"{name}: {_words(given)}")
        result = func(*args, **(kwargs or {}))
        devices |= {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        if len(devices) > 1:
            self.found.append(f"{name} between {' and '.join(sorted(devices))}: {_words(given)}")
        return result


@contextlib.contextmanager
def none_waits() -> Iterator[None]:
    """Fail if anything within would wait for the device."""
    with Waits() as waits:
        yield
    assert not waits.found, "the host would wait for the device:\n  " + "\n  ".join(waits.found)


@contextlib.contextmanager
def fake_device() -> Iterator[None]:
    """Tensors on ``"cuda"`` exist, without data."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def on_device(value: Any, device: str = "cuda") -> Any:
    """The value with new tensors, of no particular data, in place of its tensors."""

    def moved(tensor: Tensor) -> Tensor:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return empty.requires_grad_(tensor.requires_grad)

    return tree_map_only(Tensor, moved, value)


def put_on_device(module: nn.Module, device: str = "cuda") -> None:
    """The module's parameters and buffers replaced, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(on_device(parameter.detach(), device), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = on_device(buffer, device)


def _is_number(func: Any, tensor: Tensor) -> bool:
    """Whether a tensor of the host goes to the kernels as a number, with its launch."""
    moves = func.overloadpacket.__name__ in ("_to_copy", "copy_", "copy", "lift_fresh")
    return tensor.device.type == "cpu" and tensor.dim() == 0 and not moves


def _words(tensors: list[Tensor]) -> str:
    return ", ".join(f"{list(tensor.shape)} on {tensor.device.type}" for tensor in tensors) or "no tensor"
