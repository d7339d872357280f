"""Which module calls attention: names, numbers, and who never did."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _torch_modules
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from mimkernels.heads.fused import untraced
from mimkernels.nn._classes import FOLLOWING
from mimkernels.nn.sdpa import Observer, observers

LayerChoice = str | re.Pattern[str] | Sequence[str | int] | None

_ATTENTION = re.compile("attention|attn", re.IGNORECASE)
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and ``torch.compile``."""
    while True:
        parallel = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
        inner = getattr(model, "module" if parallel else "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def named_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules`` without the names of wrappers inside."""
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part not in _WRAPPERS), module


class Choice:
    """Which layers are wanted: of ``capture(layers=...)``."""

    def __init__(self, layers: LayerChoice) -> None:
        self._pattern = re.compile(layers) if isinstance(layers, str) else None
        self._items: tuple[str | int, ...] | None = None
        if isinstance(layers, re.Pattern):
            self._pattern = layers
        elif layers is not None and self._pattern is None:
            several = isinstance(layers, Iterable) and not isinstance(layers, bytes | torch.Tensor)
            self._items = tuple(layers) if several else ()
            wrong: list[Any] = [item for item in self._items if not isinstance(item, str | int)]
            wrong += [item for item in self._items if isinstance(item, int) and item < 0]
            wrong += [] if self._items else [layers]
            if wrong:
                raise ValueError(f"layers must be names, numbers from 0 or a regular expression, got {wrong[0]!r}")

    def takes(self, name: str, index: int) -> bool:
        if self._pattern is not None:
            return self._pattern.search(name) is not None
        return self._items is None or name in self._items or index in self._items

    def unmet(self, seen: Sequence[str]) -> list[str | int]:
        """What was wanted but never called attention."""
        if self._pattern is not None:
            return [] if any(map(self._pattern.search, seen)) else [self._pattern.pattern]
        return [item for item in self._items or () if item not in seen and item not in range(len(seen))]


class Calls:
    """Follows the modules of a model while the observer's context runs them, by hooks on all modules of the process.

    Args:
        model: whose modules are followed.
        observer: the same modules, run where this one does not observe, are not followed.
        left: called with a module that has run, its inputs, those by name, and its output.
    """

    def __init__(
        self, model: nn.Module, observer: Observer, left: Callable[[nn.Module, Any, dict[str, Any], Any], object]
    ) -> None:
        self._model = model
        self._observer = observer
        self._left = left
        self._names = {id(module): name or type(model).__name__ for name, module in named_parts(model)}
        self._running: list[nn.Module] = []
        self._counts: Counter[str] = Counter()
        self._ran: dict[str, nn.Module] = {}
        self._calling: set[int] = set()  # modules in which attention was called
        self._softmax: dict[str, tuple[int, ...]] = {}
        self.numbers: dict[str, int] = {}
        self.images: int | None = None  # [B, C, H, W] that the model got last, or a part of it that was called alone

    @contextmanager
    def followed(self) -> Iterator[None]:
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]
        numbers = {handle.id for handle in handles}
        FOLLOWING.update(numbers)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
                # torch 2.14 leaves this entry, and calls all modules of the process as if the hook were there.
                _torch_modules._global_forward_hooks_with_kwargs.pop(handle.id, None)
            FOLLOWING.difference_update(numbers)

    @property
    def modules(self) -> list[nn.Module]:
        """Those that run now, the innermost first; empty outside the model."""
        return self._running[::-1]

    @property
    def caller(self) -> str:
        """The name of the module that runs now."""
        return self._names[id(self._running[-1])]

    def count(self) -> tuple[str, int]:
        """Name and number of the layer that a call of attention, made now, belongs to."""
        self._calling.update(map(id, self._running))
        times = self._counts[self.caller]
        self._counts[self.caller] += 1
        name = f"{self.caller}#{times}" if times else self.caller
        return name, self.numbers.setdefault(name, len(self.numbers))

    def note_softmax(self, shape: Sequence[int]) -> None:
        if self._running and len(shape) >= 3:
            self._softmax.setdefault(self.caller, tuple(shape))

    def missed(self) -> dict[str, str]:
        """Modules that look like attention and ran without calling it, with the likely reason."""
        suspects = {
            name: module
            for name, module in self._ran.items()
            if _ATTENTION.search(type(module).__name__) and id(module) not in self._calling
        }
        inner = {
            name
            for name, module in suspects.items()
            if not any(part is not module and part in suspects.values() for part in module.modules())
        }
        return {name: self._why(name, suspects[name]) for name in suspects if name in inner}

    def nothing_seen(self, choice: Choice) -> str:
        """The message where nothing was captured."""
        if not self._ran:
            return f"nothing was captured: {type(self._model).__name__} did not run inside capture"
        if self.numbers:
            return f"nothing was captured: {self.unmet(choice)}"
        missed = self.missed() or {name: self._why(name, self._ran[name]) for name in self._softmax}
        suspects = "".join(f"\n  {name} ({type(self._ran[name]).__name__}): {why}" for name, why in missed.items())
        return (
            f"nothing was captured: {type(self._model).__name__} ran without calling F.scaled_dot_product_attention"
            + (f"; what looked like attention:{suspects}" if suspects else ", and nothing in it looked like attention")
        )

    def unmet(self, choice: Choice) -> str:
        wanted = choice.unmet(list(self.numbers))
        if not wanted:
            return ""
        return f"no layer {', '.join(map(repr, wanted))} called attention; those that did: {', '.join(self.numbers)}"

    @untraced
    def _enter(self, module: nn.Module, args: Sequence[Any]) -> None:
        name = self._names.get(id(module))
        if name is None or self._observer not in observers():
            return
        if not self._running:
            self._counts.clear()
            first = args[0] if args else None
            self.images = first.shape[0] if isinstance(first, torch.Tensor) and first.dim() == 4 else None
        self._running.append(module)
        self._ran[name] = module

    @untraced
    def _leave(self, module: nn.Module, args: object, *named_and_output: Any) -> None:
        if module not in self._running or self._observer not in observers():
            return
        # A module whose own hook failed was entered and never left.
        while self._running.pop() is not module:
            pass
        *named, output = named_and_output  # of a module that failed, PyTorch gives no inputs by name
        self._left(module, args, named[0] if named else {}, output)

    def _why(self, name: str, module: nn.Module) -> str:
        if isinstance(module, torch.jit.ScriptModule):
            return "it is scripted: what it calls cannot be seen"
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        hint = "" if implementation in (None, "sdpa") else f"; built with attn_implementation={implementation!r}"
        for part, shape in self._softmax.items():
            if part == name or part.startswith(f"{name}."):
                return f"it computes a softmax of {list(shape)} itself, without scaled_dot_product_attention{hint}"
        return f"no call of attention was seen in it: another library's kernel, or scripted code{hint}"
