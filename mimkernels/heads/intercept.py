"""Interception by a function mode: calls of attention inside captured models go to ``mimkernels.nn.sdpa``.

For ``capture``, which looks on for the time of a block: a mode sees every call of ``F.scaled_dot_product_attention``
that its thread makes, however it is reached and whatever module makes it, and the model is not touched. It also sees
convolutions, gathers and softmaxes, which tell where patches lie and which layers store their map.

The two other ways would not do. Rewriting (``mimkernels.integrations._reroute``) needs the source of every forward, and
a change of class (``mimkernels.nn._classes``) a forward written by us; both change the model for every thread that runs
it. They are for computing faster: a mode costs a look at every function of PyTorch that is called, compiled code does
not pass through it, and it ends with its block.
"""

from __future__ import annotations

import inspect
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mimkernels.heads.fused import fused_attention, sharing, uncompiled, untraced
from mimkernels.heads.layout import LAYOUT_FUNCTIONS
from mimkernels.nn.sdpa import (
    DIM_DIVISOR,
    MOST_DIMS,
    AttentionCall,
    Observer,
    SDPAArguments,
    as_attention,
    has_own_rules,
    is_recomputing,
    keeps_tensors_elsewhere,
    observers,
    observing,
    refusals,
    sdpa,
    tensors_with_own_rules,
)

__all__ = ["FunctionObserver", "Interception", "intercepted"]

_NOTED = LAYOUT_FUNCTIONS.union((F.softmax, torch.softmax, Tensor.softmax))


class FunctionObserver(ABC):
    """An observer of ``mimkernels.nn.sdpa`` that is shown other functions of PyTorch, too."""

    @property
    @abstractmethod
    def runs(self) -> bool:
        """Whether a part of the observed model runs now."""

    @abstractmethod
    def note(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """Look at what another function than attention gave: of ``LAYOUT_FUNCTIONS``, or a softmax."""


def intercepted(model: nn.Module, observer: Observer, calls: AbstractContextManager[object]) -> ExitStack:
    """Until what is returned is closed, `observer` computes or sees what `model` calls; `calls` follow its modules."""
    with ExitStack() as stack:
        # Compiled code would be traced anew with what is observed in it; it runs as it was written instead.
        stack.enter_context(uncompiled())
        stack.enter_context(fused_attention(model))
        stack.enter_context(calls)
        stack.enter_context(observing(observer))
        # One for all observers of a thread: which of them a call concerns, they know.
        stack.enter_context(sharing(("calls of the thread", get_ident()), Interception))
        return stack.pop_all()


class Interception(TorchFunctionMode):
    """Sends calls of attention inside captured models to ``mimkernels.nn.sdpa``, and shows other calls to captures."""

    def __init__(self) -> None:
        super().__init__()
        self._multi_head: dict[str, Callable[..., Any]] = {}

    @untraced
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention and func is not F.multi_head_attention_forward:
            result = func(*args, **kwargs)
            if func in _NOTED and not is_recomputing():
                for observer in _function_observers():
                    observer.note(func, args, kwargs, result)
            return result
        if is_recomputing() or not any(observer.runs for observer in _function_observers()):
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        return self._attend_multi_head(*args, **kwargs)

    def _attend(self, *args: Any, **kwargs: Any) -> Tensor:
        arguments = SDPAArguments(*args, **kwargs)
        foreign = tensors_with_own_rules(arguments)
        reasons = foreign or refusals(arguments)
        if not reasons and keeps_tensors_elsewhere():
            reasons = ["saved tensors are hooked, as in gradient checkpointing"]
        if not reasons:
            return sdpa(arguments).out
        out = F.scaled_dot_product_attention(*args, **kwargs)
        note = f"computed as it is: {'; '.join(reasons)}"
        if foreign:
            _show(None, f"{note}; no statistics")
        else:
            _watch(note, arguments)
        return out

    def _attend_multi_head(self, *args: Any, **kwargs: Any) -> Any:
        """``F.multi_head_attention_forward``, whose own calls of attention no mode would see."""
        func = F.multi_head_attention_forward
        given = inspect.signature(func).bind(*args, **kwargs).arguments
        foreign = [f"{name} is a {type(item).__name__}" for name, item in given.items() if has_own_rules(item)]
        if foreign:
            result = func(*args, **kwargs)
            _show(None, f"computed as it is: {'; '.join(foreign)}; no statistics")
            return result
        if not given.get("need_weights", True):
            return self._calling("_attend", self._attend)(*args, **kwargs)
        result = func(*args, **kwargs)
        with torch.no_grad() if keeps_tensors_elsewhere() else nullcontext():
            self._calling("_only_watch", _only_watch)(**{**given, "need_weights": False})
        return result

    def _calling(self, name: str, attend: Callable[..., Any]) -> Callable[..., Any]:
        """``F.multi_head_attention_forward`` with another scaled_dot_product_attention among its globals."""
        if name not in self._multi_head:
            func = F.multi_head_attention_forward
            names = {**func.__globals__, "scaled_dot_product_attention": attend, "has_torch_function": lambda _: False}
            rerouted = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
            rerouted.__kwdefaults__ = func.__kwdefaults__
            self._multi_head[name] = rerouted
        return self._multi_head[name]


def _function_observers() -> list[FunctionObserver]:
    """Those of this thread and asyncio task."""
    return [observer for observer in observers() if isinstance(observer, FunctionObserver)]


def _watch(note: str, arguments: SDPAArguments) -> None:
    """Show all who observe a call that is computed elsewhere."""
    query, key = arguments.query, arguments.key
    if query.is_nested:
        _show(None, f"{note}; no statistics of nested tensors")
        return
    if query.shape[-1] == 0:
        _show(None, f"{note}; no statistics of heads without dims")
        return
    # Values of other shapes than the keys' fit no kernel; NaN, so that nothing is said of their norms.
    value = arguments.value if arguments.value.shape == key.shape else torch.full_like(key, torch.nan)
    call = as_attention(arguments._replace(value=value))
    dim = query.shape[-1]
    if dim < MOST_DIMS and dim % DIM_DIVISOR:  # filled up with zeros, which changes no score
        q, k, v = (F.pad(tensor, (0, -dim % DIM_DIVISOR)) for tensor in (call.q, call.k, call.v))
        call = call._replace(q=q, k=k, v=v)
    _show(call, note)


def _show(call: AttentionCall | None, note: str) -> None:
    for observer in observers():
        observer.watch(call, note)


def _only_watch(*args: Any, **kwargs: Any) -> Tensor:
    arguments = SDPAArguments(*args, **kwargs)
    _watch("computed as it is: need_weights=True asks for its maps", arguments)
    return arguments.query  # has the result's shape, and is not used
