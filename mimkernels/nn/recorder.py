"""The recorder of what heads do, and what it writes down layer by layer.

One class writes, ``HeadRecorder``, and one type holds what was written, ``LayerHeads``; two feeds lead to it, both told
by ``mimkernels.nn.sdpa.attend``:

- ``LayerRecorder`` attaches to layers of ours, as an attribute that a layer hands to ``attend``. Compiled code sees the
  attribute (``torch.compile`` guards it), and gradient checkpointing can repeat what was recorded. MAE and
  ``mimkernels.heads.record_heads`` use it.
- ``mimkernels.heads.capture`` observes the calling thread, for models whose attention knows nothing of a recorder. Its
  models run uncompiled while they are captured; inside checkpointing it computes its statistics beside the pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from threading import get_ident
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mimkernels.nn.sdpa import NO_STATISTICS, AttentionCall, StatisticsRequest, is_recomputing
from mimkernels.ops import AttentionOutput
from mimkernels.ops.attention.spec import STATISTICS

__all__ = ["HeadRecorder", "LayerHeads", "LayerRecorder", "recorder_of"]

KEPT = ("q", "k", "lse", "output")
_SCORES = ("bias", "bias_table", "bias_index", "key_mask", "logit_scale")  # what scores are made of besides q and k


@dataclass(eq=False)
class LayerHeads:
    """What the heads of one layer did.

    Attributes:
        name: the qualified name of the module that computed attention; of ``capture``, its second call in one forward
            pass is ``name#1``, and so on.
        index: the layer's number: in the model's order, or of ``capture`` in that of the calls.
        heads, queries, keys: sizes of the last call.
        num_prefix: leading keys that are no patches.
        windows: per image, in which attention runs, as Swin's; one after the other among the B. 1 of other layers.
        missing: quantities that this layer cannot have, with the reason.
        notes: what to know about the numbers.
        scale: of the scores, in the last call; None of cosine attention.
        q, k: ``[B, H, N, D]`` as given to attention, if kept; else None.
        lse: ``[B, H, N]`` fp32, if kept; else None.
        output: ``[B, N, C]`` after the output projection, before its dropout, if kept; else None.
        bias, bias_table, bias_index, key_mask, logit_scale: of the scores, as given to attention, if q or k are kept;
            mostly None.
        has_run: a call was seen; False of a layer that a recorder waits for.

    Example::

        received_attention(layer.q, layer.k, layer.lse, **layer.options)
    """

    name: str
    index: int
    heads: int = 0
    queries: int = 0
    keys: int = 0
    num_prefix: int = 0
    windows: int = 1
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    scale: float | None = None
    q: Tensor | None = None
    k: Tensor | None = None
    lse: Tensor | None = None
    output: Tensor | None = None
    bias: Tensor | None = None
    key_mask: Tensor | None = None
    bias_table: Tensor | None = None
    bias_index: Tensor | None = None
    logit_scale: Tensor | None = None
    has_run: bool = True
    _rows: list[dict[str, Tensor]] = field(default_factory=list, repr=False)
    _padding: list[tuple[Tensor | None, tuple[int, int]]] = field(default_factory=list, repr=False)

    @property
    def stats(self) -> dict[str, Tensor]:
        """Row statistics ``[B, H, Nq]`` by name, fp32 (``argmax``: int64), the images of all calls one after the other.

        Empty where only sums are kept, as with ``capture(accumulate=True)``.

        Raises:
            ValueError: calls had different numbers of heads or queries.
        """
        if len(self._rows) == 1:
            return dict(self._rows[0])
        stats = {}
        for name in dict.fromkeys(name for rows in self._rows for name in rows):
            parts = [rows[name] for rows in self._rows if name in rows]
            shapes = list(dict.fromkeys(tuple(part.shape[1:]) for part in parts))
            if len(shapes) > 1:
                raise ValueError(
                    f"{self.name} ran with different numbers of heads and queries, {list(shapes[0])} and "
                    f"{list(shapes[1])}: capture them one by one, or with accumulate=True"
                )
            stats[name] = torch.cat(parts)
        return stats

    @property
    def padding(self) -> Tensor | None:
        """``[B, Nq]`` bool, the rows of ``stats`` that are of padding, or None if there was none.

        Padding are patches that a mask hides from every query; seen by ``capture``.
        """
        parts = [part for part, _ in self._padding if part is not None]
        if not parts:
            return None
        return torch.cat([parts[0].new_zeros(sizes) if part is None else part for part, sizes in self._padding])

    @property
    def options(self) -> dict[str, Any]:
        """What the companion ops and ``HeadStatistics.update`` need besides q, k and lse."""
        return {name: getattr(self, name) for name in (*_SCORES, "scale")}

    def describe(self) -> dict[str, Any]:
        """Everything but tensors, as plain Python."""
        names = ("index", "name", "heads", "queries", "keys", "num_prefix", "windows")
        sizes = {name: getattr(self, name) for name in names}
        return {**sizes, "missing": dict(self.missing), "notes": list(self.notes)}

    def add_note(self, note: str) -> None:
        """Say something about the numbers, once; "" is nothing."""
        if note and note not in self.notes:
            self.notes.append(note)

    def set_sizes(self, call: AttentionCall) -> None:
        """Take the sizes of a call."""
        self.heads, self.queries, self.keys = call.q.shape[1], call.q.shape[2], call.k.shape[2]


class HeadRecorder:
    """Writes calls of attention down, each into the ``LayerHeads`` of its layer.

    Args:
        keep: what to keep besides statistics, of "q", "k", "lse", "output".
        rows: keep row statistics.
        differentiable: rows keep their gradients.
    """

    def __init__(self, keep: Sequence[str] = (), *, rows: bool = True, differentiable: bool = True) -> None:
        self.keep = tuple(keep)
        self._keeps_rows = rows
        self._differentiable = differentiable

    def write(
        self,
        layer: LayerHeads,
        call: AttentionCall,
        output: AttentionOutput,
        images: Sequence[int] | None = None,
        padding: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Write one call down, and return its row statistics as they are kept.

        Args:
            images: numbers of those of which q, k and lse are kept, with all their windows; None: of all.
            padding: ``[B, N]`` bool, tokens that are none, if that is known.
        """
        rows = output.stats if self._differentiable else {name: row.detach() for name, row in output.stats.items()}
        layer.has_run = True
        layer.set_sizes(call)
        layer.scale = call.scale
        if self._keeps_rows:
            layer._rows.append(rows)
            layer._padding.append((padding, (call.q.shape[0], call.q.shape[2])))
        keep = self.keep
        if keep and images is not None:
            call, output = _of_images(images, layer.windows, call, output)
        if "q" in keep:
            layer.q = call.q
        if "k" in keep:
            layer.k = call.k
        if "lse" in keep:
            layer.lse = output.lse
        if "q" in keep or "k" in keep:
            for name in _SCORES:
                setattr(layer, name, getattr(call, name))
        return rows


def _of_images(
    images: Sequence[int], windows: int, call: AttentionCall, output: AttentionOutput
) -> tuple[AttentionCall, AttentionOutput]:
    """A call as if it had been made of some of its images alone; copies of what is theirs."""
    first = torch.tensor(images, dtype=torch.int64, device=call.q.device) * windows
    rows = (first[:, None] + torch.arange(windows, device=call.q.device)).flatten()
    bias, key_mask = call.bias, call.key_mask
    if bias is not None and windows % len(bias):  # image b takes row b modulo W
        bias = bias[rows % len(bias)]
    if key_mask is not None:
        key_mask = key_mask[rows]
    chosen = call._replace(q=call.q[rows], k=call.k[rows], bias=bias, key_mask=key_mask)
    return chosen, output._replace(lse=output.lse[rows])


class LayerRecorder:
    """Records one forward pass of layers of ours, in this thread; a context manager that gives their ``LayerHeads``.

    Args:
        layers: modules that hand ``recorder_of(self)`` to ``attend``.
        names: of the layers; their numbers if None.
        stats, num_prefix: as of ``attention``.
        positions: as of ``attention``, or those of every layer: of windows ``[W, N, d]``, W a divisor of the batch.
        keep: as of ``HeadRecorder``.

    Raises:
        ValueError, TypeError: an unknown name, or distances without positions.
        RuntimeError: on leaving, layers that recorded nothing, or without gradients though in training; inside,
            a layer that runs twice, attention dropout, nesting.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        stats: Sequence[str] = (),
        *,
        names: Sequence[str] | None = None,
        num_prefix: int = 0,
        positions: Tensor | Sequence[Tensor | None] | None = None,
        keep: Sequence[str] = (),
    ) -> None:
        for argument, given, known in (("stats", stats, STATISTICS), ("keep", keep, KEPT)):
            if isinstance(given, str):
                raise TypeError(f"{argument} must be a sequence of names, got the string {given!r}")
            if not isinstance(given, Iterable):
                raise TypeError(f"{argument} must be a sequence of names, got {type(given).__name__}")
            unknown = [item for item in given if item not in known]
            if unknown:
                raise ValueError(f"unknown {unknown[0]!r} in {argument}; known: {', '.join(known)}")
        places = [positions] * len(layers) if positions is None or isinstance(positions, Tensor) else list(positions)
        if "distance" in stats and any(place is None for place in places):
            raise ValueError("the statistic 'distance' needs positions, got None")
        recorder = HeadRecorder(keep)
        wanted = tuple(dict.fromkeys(stats))
        requests = {id(place): StatisticsRequest(wanted, num_prefix, place) for place in places}
        if names is None:
            names = [str(index) for index in range(len(layers))]
        self._layers: list[Any] = list(layers)  # modules with a `_recorder`
        self._slots = [
            _Slot(recorder, requests[id(place)], name, index)
            for index, (name, place) in enumerate(zip(names, places, strict=True))
        ]
        self._with_grad = False

    @property
    def heads(self) -> list[LayerHeads]:
        """What each layer did, in the order of ``layers``."""
        return [slot.heads for slot in self._slots]

    def __enter__(self) -> Any:
        if not self._layers:
            raise RuntimeError("this recorder was used before; call record_heads for every forward pass")
        for layer in self._layers:
            if layer._recorder is not None:
                raise RuntimeError("these layers are already being recorded: record_heads cannot be nested")
        self._with_grad = torch.is_grad_enabled()
        for layer, slot in zip(self._layers, self._slots, strict=True):
            slot.thread = None if torch.compiler.is_compiling() else get_ident()
            slot.layer = layer
            layer._recorder = slot
        return self.heads

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        layers, self._layers = self._layers, []
        for layer, slot in zip(layers, self._slots, strict=True):
            layer._recorder = None
            slot.layer = None
        if kind is not None:
            return
        silent = [slot.heads.index for slot in self._slots if not slot.heads.has_run]
        if silent:
            raise RuntimeError(
                f"{len(silent)} of {len(layers)} attention layers recorded nothing ({_listed(silent)}): they did not "
                "run inside record_heads"
            )
        if self._with_grad and any(
            not slot.with_grad and layer.training and any(weight.requires_grad for weight in layer.parameters())
            for layer, slot in zip(layers, self._slots, strict=True)
        ):
            raise RuntimeError(
                "statistics were recorded without gradients: layers ran under no_grad inside record_heads, as "
                "reentrant gradient checkpointing does. Use use_reentrant=False, or put torch.no_grad() around "
                "record_heads if no gradients are wanted"
            )


class _Slot:
    """One layer's place in a ``LayerRecorder``: what the layer hands to ``attend``."""

    def __init__(self, recorder: HeadRecorder, request: StatisticsRequest, name: str, index: int) -> None:
        self.request = request
        self.heads = LayerHeads(name, index, num_prefix=request.num_prefix, has_run=False)
        self.layer: nn.Module | None = None  # while it is attached
        self.thread: int | None = None  # the one that records; compiled code cannot tell
        self.with_grad = False
        self._recorder = recorder

    def record(self, call: AttentionCall, output: AttentionOutput) -> None:
        heads = self.heads
        if heads.has_run:
            raise RuntimeError(
                f"attention layer {heads.index} ran a second time inside record_heads; record each forward pass by "
                "itself"
            )
        stats = {name: output.stats[name] for name in self.request.stats}  # an observer may have wanted others
        self._recorder.write(heads, call, output._replace(stats=stats))
        self.with_grad = torch.is_grad_enabled()
        assert self.layer is not None
        _await_backward(self.layer, self.request, output.lse)

    def record_projected(self, output: Tensor) -> None:
        """Write down the layer's output after its projection."""
        if "output" in self._recorder.keep:
            self.heads.output = output


class _Repeated:
    """Stands for the recorder of a pass that gradient checkpointing repeats: the same statistics, written nowhere."""

    def __init__(self, request: StatisticsRequest) -> None:
        self.request = request

    def record(self, call: AttentionCall, output: AttentionOutput) -> None: ...

    def record_projected(self, output: Tensor) -> None: ...


def recorder_of(layer: nn.Module) -> _Slot | _Repeated | None:
    """What records the pass that `layer` runs now, in this thread; None if nothing does."""
    if is_recomputing():
        request = _request_of_recorded_pass(layer)
        return None if request is NO_STATISTICS else _Repeated(request)
    attached: Any = layer._recorder
    slot: _Slot | None = attached
    if slot is None or torch.compiler.is_compiling() or slot.thread in (None, get_ident()):
        return slot
    return None


# Gradient checkpointing runs a layer again inside the backward pass, when the recorder is long gone, and must save the
# same tensors: so a recorded pass leaves its request with the autograd node of its lse, for as long as that lives.
_awaiting_backward: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[StatisticsRequest]]
_awaiting_backward = weakref.WeakKeyDictionary()


def _await_backward(layer: nn.Module, request: StatisticsRequest, lse: Tensor) -> None:
    if torch.compiler.is_compiling() or lse.grad_fn is None:
        return
    node: Any = lse.grad_fn  # whose metadata torch annotates as a function
    node.metadata["mimkernels.recorded"] = request
    _awaiting_backward.setdefault(layer, weakref.WeakSet()).add(request)


def _request_of_recorded_pass(layer: nn.Module) -> StatisticsRequest:
    first, *others = _awaiting_backward.get(layer, ()) or (NO_STATISTICS,)
    if not all(first.computes_the_same(other) for other in others):
        raise RuntimeError(
            "under gradient checkpointing, two passes recorded with different statistics or positions wait for their "
            "backward passes: run each backward pass before the next forward pass"
        )
    return first


def _listed(numbers: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(str(number) for number in numbers[:most])
    return f"{shown}, ..." if len(numbers) > most else shown
