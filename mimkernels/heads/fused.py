"""Modules with a plain and a fused branch of attention take the fused one, and compiled ones none, for a while.

Of timm's BEiT, Swin and Swin V2, ours stands in for the time: it reads their biases from tables.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import nn

from mimkernels.nn._classes import STANDS_IN, become, change_back

_Function = TypeVar("_Function", bound=Callable[..., Any])

_lock = threading.RLock()
_shared: dict[Hashable, tuple[int, ExitStack]] = {}  # what is changed now: by how many, and how it is undone


def untraced(function: _Function) -> _Function:
    """``torch.compiler.disable``, which is not annotated, with the type of the function."""
    return cast(_Function, torch.compiler.disable(function))


@contextmanager
def sharing(key: Hashable, change: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Inside the block, something that all threads see is changed: the first to come does it, the last to go undoes it.

    Were each to put back what it found, threads that leave in the order they came in would leave the change behind.
    """
    with _lock:
        count, stack = _shared.get(key, (0, ExitStack()))
        if count == 0:
            stack.enter_context(change())
        _shared[key] = count + 1, stack
    try:
        yield
    finally:
        with _lock:
            count, stack = _shared.pop(key)
            if count > 1:
                _shared[key] = count - 1, stack
            else:
                stack.close()


@contextmanager
def fused_attention(model: nn.Module) -> Iterator[None]:
    """Inside the block, timm's, transformers' and torch's modules call ``F.scaled_dot_product_attention``."""
    with ExitStack() as stack:

        def change(owner: Any, name: str, unchanged: bool, value: Any) -> None:
            key = id(owner), name
            with _lock:
                if unchanged or key in _shared:
                    stack.enter_context(sharing(key, partial(_set, owner, name, value)))

        # torch.nn.MultiheadAttention and TransformerEncoderLayer have a kernel of their own in eval mode.
        stack.enter_context(sharing("fast path", _without_fast_path))
        kinds = _kinds_of_timm()
        for module in model.modules():
            key, ours = (id(module), "class"), kinds.get(type(module))
            with _lock:
                if ours is not None or key in _shared:
                    stack.enter_context(sharing(key, partial(_as, module, ours or type(module))))
            change(module, "fused_attn", getattr(module, "fused_attn", None) is False, True)  # timm
            config = getattr(module, "config", None)
            # transformers; who asks for maps in the configuration, needs the branch that makes them.
            eager = (
                getattr(module, "_supports_sdpa", False)
                and getattr(config, "_attn_implementation", None) == "eager"
                and not getattr(config, "output_attentions", False)
            )
            change(config, "_attn_implementation_internal", eager, "sdpa")
        yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside the block, compiled code runs as it was written."""
    with sharing("stance", _force_eager):
        yield


@contextmanager
def _force_eager() -> Iterator[None]:
    with warnings.catch_warnings():
        # Whoever follows modules does so by hooks on all of them, which compiled modules warn of.
        warnings.filterwarnings("ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks")
        with torch.compiler.set_stance("force_eager"):
            yield


@contextmanager
def _without_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _kinds_of_timm() -> Mapping[Any, type[nn.Module]]:
    """timm's attention whose masks or matrices its own code makes, and ours in its place."""
    if "timm.models" not in sys.modules:
        return {}
    from mimkernels.nn.relative import RELATIVE  # needs timm, which this does not

    return RELATIVE


@contextmanager
def _as(module: nn.Module, ours: type[nn.Module]) -> Iterator[None]:
    become(module, ours)
    module.__dict__[STANDS_IN] = True
    try:
        yield
    finally:
        # Not if `accelerate` made it stay.
        if module.__dict__.pop(STANDS_IN, False):
            change_back(module)


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
