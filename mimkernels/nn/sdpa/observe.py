"""Observation of attention: whoever observes a thread is told of every call of attention that it computes.

``attend`` is where all of it passes: the modules of ``mimkernels.nn``, the stand-in for
``F.scaled_dot_product_attention`` and the calls that ``mimkernels.heads.capture`` intercepts. It tells two kinds of
listeners, which write what they see into the same ``mimkernels.nn.recorder.HeadRecorder``:

- *observers* of the calling thread and asyncio task (``observing``), who see calls of modules that know none of them.
- the *recorder* that a layer of ours was given (``mimkernels.heads.record_heads``) and hands to ``attend``.

Both are needed. Observers are found through a context variable: compiled code neither reads one nor is compiled again
when it changes, and gradient checkpointing recomputes on threads of autograd, which have other contexts. A layer's
attribute is guarded by ``torch.compile`` and is there when the layer is recomputed; but only layers of ours have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import get_ident
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mimkernels.nn.sdpa.translate import AttentionCall
from mimkernels.ops import AttentionOutput

__all__ = [
    "NO_STATISTICS",
    "Observer",
    "Patches",
    "Recorder",
    "StatisticsRequest",
    "attend",
    "is_recomputing",
    "keeps_tensors_elsewhere",
    "observers",
    "observing",
    "tell_patches",
    "wants_statistics",
]


@dataclass(frozen=True, eq=False)
class StatisticsRequest:
    """Row statistics that ``attention`` is to compute besides its output; attributes as its arguments."""

    stats: tuple[str, ...] = ()
    num_prefix: int = 0
    positions: Tensor | None = None

    @property
    def options(self) -> dict[str, Any]:
        """As keyword arguments of ``attention``."""
        return {"num_prefix": self.num_prefix, "positions": self.positions, "stats": self.stats}

    def computes_the_same(self, other: StatisticsRequest) -> bool:
        same_positions = self.positions is other.positions or "distance" not in self.stats
        return self.stats == other.stats and self.num_prefix == other.num_prefix and same_positions


NO_STATISTICS = StatisticsRequest()


class Patches(NamedTuple):
    """What images became at a patch embedding.

    Attributes:
        batch: number of images.
        grid: patches per axis.
        patch_size: pixels per patch and axis, or None if that is not known.
        ids: ``[B, K]`` the patches that were kept, in the order of their tokens; None if that is all of them.
        grids: ``[B, axes]`` patches per axis of each image, where they differ from `grid`, which has the most.
    """

    batch: int
    grid: tuple[int, ...]
    patch_size: tuple[int, ...] | None = None
    ids: Tensor | None = None
    grids: Tensor | None = None


class Observer(Protocol):
    """Sees every attention that its context computes while it observes."""

    def run(self, call: AttentionCall) -> AttentionOutput:
        """Compute the call, and what is observed from the same pass."""

    def watch(self, call: AttentionCall | None, note: str = "") -> None:
        """Observe a call that is computed elsewhere; None if nothing is known of it but the note."""

    def see_patches(self, embedding: nn.Module, patches: Patches) -> None:
        """Know which patches the module `embedding` turned into tokens."""


class Recorder(Protocol):
    """Records the calls of one layer, which hands it to ``attend``."""

    @property
    def request(self) -> StatisticsRequest:
        """The statistics that every pass of the layer computes, also the one that gradient checkpointing repeats."""

    def record(self, call: AttentionCall, output: AttentionOutput) -> None:
        """Write down a call, from the pass that computed it."""


def attend(
    call: AttentionCall, request: StatisticsRequest = NO_STATISTICS, recorder: Recorder | None = None
) -> AttentionOutput:
    """``attention`` of a call; whoever observes is told. Every module and integration calls attention by this.

    Args:
        call: what to compute.
        request: statistics that the caller wants, if no recorder asks for any.
        recorder: of the layer that calls, if it records.
    """
    if recorder is not None:
        request = recorder.request
    watching = observers()
    if (watching or recorder is not None) and is_recomputing():
        return call.compute(**request.options)
    if watching and not request.stats and not keeps_tensors_elsewhere():
        output = watching[-1].run(call)
        watching = watching[:-1]
    else:
        output = call.compute(**request.options)
    for observer in watching:
        observer.watch(call)
    if recorder is not None:
        recorder.record(call, output)
    return output


# Who observes, the innermost last. Each with its thread, because a context may be copied into another thread: what runs
# there at the same time would be mixed up with what runs here.
_observers: ContextVar[tuple[tuple[int, Observer], ...]] = ContextVar("mimkernels_observers", default=())


def observers() -> tuple[Observer, ...]:
    """Those who observe this thread and asyncio task now, the innermost last; nobody observes compiled code.

    Threads of autograd, which run backward passes and the recomputation of gradient checkpointing, have none.
    """
    if torch.compiler.is_compiling():
        return ()
    known = _observers.get()
    return tuple(observer for thread, observer in known if thread == get_ident()) if known else ()


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Show the observer every attention that this thread and asyncio task compute inside the block."""
    _observers.set((*_observers.get(), (get_ident(), observer)))
    try:
        yield
    finally:
        # Not reset by a token, which another context would refuse: a block may be left in another one, as in notebooks.
        _observers.set(tuple(item for item in _observers.get() if item[1] is not observer))


def wants_statistics() -> bool:
    """Whether an observer of this thread has statistics computed by the pass of a call itself, not beside it."""
    return bool(observers()) and not keeps_tensors_elsewhere()


def tell_patches(embedding: nn.Module, patches: Patches) -> None:
    """Tell all who observe of patches that were embedded by something else than the module's own forward."""
    for observer in observers():
        observer.see_patches(embedding, patches)


def is_recomputing() -> bool:
    """Whether this runs inside a backward pass, as gradient checkpointing's second forward pass does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def keeps_tensors_elsewhere() -> bool:
    """Whether saved tensors are hooked: gradient checkpointing must save the same ones in its second pass."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
