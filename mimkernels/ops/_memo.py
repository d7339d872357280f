"""What was checked once is not checked again.

Whether an op takes its inputs, what runs and with which other arguments depends on the signature of the call alone:
shape, dtype, device, layout and requires_grad of each tensor, and the value of each option. (The values in tensors are
the kernels' business.) A signature that passed is remembered with what the checks came to, and the next call of it goes
straight to the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from operator import methodcaller
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active as in_torch_func
from torch._C import _get_tracing_state as tracing
from torch._C import is_grad_enabled, is_inference_mode_enabled
from torch._C._functorch import is_functorch_wrapped_tensor, unwrap_if_dead
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from mimkernels.ops._checks import rows
from mimkernels.ops._registry import forced

MOST = 4096  # signatures kept of one op; then it starts anew

_PLAIN = (Tensor, nn.Parameter)
# Options of other types are looked at in every call: they may change, or hold tensors.
_FIXED = {bool, int, float, str, tuple, list, type(None), torch.dtype, torch.device}

_CAPTURED = -1  # a stream of no constants that are remembered: what it does is recorded for a CUDA graph

_Run = TypeVar("_Run", covariant=True)
_Tensors = TypeVar("_Tensors", bound=tuple[Tensor | None, ...], covariant=True)
_Constants = TypeVar("_Constants", bound=tuple[Any, ...], covariant=True)
_Step = Callable[[Tensor], Tensor | None]
# By signature: what runs, what turns the given tensors into the ones it takes, its other arguments, and of those on a
# CUDA device the device and the stream.
_Home = tuple[torch.device, int]
_Known = dict[tuple[Any, ...], tuple[Any, tuple[tuple[_Step, ...], ...] | None, Any, _Home | None]]


class Checked(Protocol[_Run, _Tensors, _Constants]):
    """What ``by_signature`` makes of a function; ``known`` are the signatures that it remembers."""

    known: _Known

    def __call__(self, tensors: tuple[Tensor | None, ...], *options: Any) -> tuple[_Run, _Tensors, _Constants]: ...


def by_signature(
    checked: Callable[..., tuple[_Run, _Tensors, _Constants]],
) -> Checked[_Run, _Tensors, _Constants]:
    """``checked(*tensors, *options)`` as a function of ``(tensors, *options)`` that looks at each signature once.

    ``checked`` raises what the op refuses, and returns what runs, the tensors as it takes them, and the arguments after
    those. All it looks at is the signature and the backend in force. The tensors it returns are its own in the same
    order, each perhaps left out (None), detached, in another dtype, with contiguous rows, or with dims of size 1 added
    or removed: these steps are remembered too. While torch.compile traces, for subclasses of tensors (such as fake
    ones) and for symbolic sizes, nothing is looked up or remembered.
    """
    known: _Known = {}

    @wraps(checked)
    def recall(tensors: tuple[Tensor | None, ...], *options: Any) -> Any:
        if is_compiling() or in_torch_func() or forward_ad._current_level >= 0 or tracing() is not None:
            return checked(*tensors, *options)
        try:
            signature = _signature(tensors, options)
            found = None if signature is None else known.get(signature)
        except (TypeError, RuntimeError, IndexError):  # not hashable, or a layout without sizes or strides
            signature = found = None
        if found is not None:
            run, steps, constants, home = found
            # On another stream a tensor among the constants might be read before it is filled: there, others are made.
            if home is None or home == _home(home[0]):
                return run, tensors if steps is None else tuple(map(_take, tensors, steps)), constants
        if signature is None:  # what a transform of torch.func left behind is a tensor as any other
            tensors = tuple(unwrap_if_dead(tensor) if isinstance(tensor, Tensor) else tensor for tensor in tensors)
        run, ready, constants = checked(*tensors, *options)
        if signature is not None and _FIXED.issuperset(signature[0]) and all(map(_lasts, constants)):
            home = next((_home(constant.device) for constant in constants if _on_cuda(constant)), None)
            if home is None or home[1] != _CAPTURED:
                steps = tuple(map(_steps, tensors, ready))
                if len(known) >= MOST:
                    known.clear()
                known[signature] = run, steps if any(steps) else None, constants, home
        return run, ready, constants

    remembering = cast(Checked[_Run, _Tensors, _Constants], recall)
    remembering.known = known
    return remembering


def _signature(tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that the checks look at; None where a tensor is of a subclass."""
    types = tuple(map(type, options))
    if list in types or tuple in types:
        options = tuple(tuple(option) if type(option) is list else option for option in options)
        for option in options:
            if type(option) is tuple:
                types += tuple(map(type, option))
    # The types, because True, 1 and 1.0 are equal.
    signature: list[Any] = [types, options, forced.get(), is_grad_enabled(), is_inference_mode_enabled()]
    for tensor in tensors:
        if tensor is None:
            signature.append(None)
        elif type(tensor) in _PLAIN and not is_functorch_wrapped_tensor(tensor):
            signature += (
                tensor.shape,
                tensor.dtype,
                tensor.layout,
                tensor.is_cpu or tensor.device,
                tensor.is_contiguous() or tensor.stride()[-1],
                tensor.requires_grad,
            )
        else:
            return None
    return tuple(signature)


def _steps(given: Tensor | None, ready: Tensor | None) -> tuple[_Step, ...]:
    """What turns the given tensor, and every other of its signature, into the ready one."""
    if ready is given:
        return ()
    if ready is None:
        return (_drop,)
    assert given is not None
    steps: list[_Step] = []
    if given.requires_grad and not ready.requires_grad:
        steps.append(Tensor.detach)
    if ready.dtype != given.dtype:
        steps.append(partial(torch.ne, other=0) if ready.dtype == torch.bool else methodcaller("to", ready.dtype))
    if rows(given) is not given:
        steps.append(Tensor.contiguous)
    if ready.shape != given.shape:
        steps.append(methodcaller("view", *ready.shape))
    return tuple(steps)


def _drop(tensor: Tensor) -> None:
    return None


def _take(tensor: Any, steps: tuple[_Step, ...]) -> Any:
    for step in steps:
        tensor = step(tensor)
    return tensor


def _lasts(constant: object) -> bool:
    """Whether a constant may be used again: a tensor only on these devices, and of no transform such as vmap."""
    if not isinstance(constant, Tensor):
        return True
    if type(constant) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(constant):
        return False
    return constant.is_cpu or constant.is_cuda


def _on_cuda(constant: object) -> bool:
    return isinstance(constant, Tensor) and constant.is_cuda


def _home(device: torch.device) -> _Home:
    """Where constants of a device are ready without waiting for it: the stream in which they are filled."""
    # A graph fills its own at every replay: those of others may be gone by then, and its own are no one else's.
    captured = torch.cuda.is_current_stream_capturing()
    return device, _CAPTURED if captured else torch.cuda.current_stream(device).cuda_stream
