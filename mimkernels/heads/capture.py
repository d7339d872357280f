"""Head statistics of any model that calls ``F.scaled_dot_product_attention``, without touching it.

``capture`` observes the calling thread (``mimkernels.nn.sdpa.observe``), and for the time of its block lets a function
mode send the calls of models that know nothing of mimkernels there (``mimkernels.heads.intercept``). What it sees is
written by the recorder of ``mimkernels.nn.recorder``; ``mimkernels.heads.calls`` says which layer it is of,
``mimkernels.heads.layout`` which of its tokens are patches, and where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mimkernels.heads.arrange import Arranged, arranged
from mimkernels.heads.calls import Calls, Choice, LayerChoice, unwrapped
from mimkernels.heads.fused import untraced
from mimkernels.heads.intercept import FunctionObserver, intercepted
from mimkernels.heads.layout import LAYOUT_FUNCTIONS, Layouts, described, shown_grid
from mimkernels.heads.padding import padding_of, without_padding
from mimkernels.heads.presets import PRESETS, QUANTITIES, Preset, patch_grid_positions, required_stats
from mimkernels.heads.record import RecordedHeads
from mimkernels.heads.statistics import HeadStatistics
from mimkernels.nn.recorder import HeadRecorder, LayerHeads
from mimkernels.nn.sdpa import AttentionCall, Patches, StatisticsRequest, keeps_tensors_elsewhere
from mimkernels.ops import AttentionOutput
from mimkernels.ops._autograd import transformed

__all__ = ["Capture", "capture"]

_TRANSFORMED = "inside a transform of torch.func, or forward-mode gradients: no statistics"
_PADDED = "some patches are hidden from every query: statistics over images leave them out as padding, rows have them"


@untraced
def capture(
    model: nn.Module,
    stats: str | Preset | Sequence[str | Preset],
    *,
    positions: str | Sequence[int] | Tensor = "auto",
    num_prefix: str | int = "auto",
    layers: LayerChoice = None,
    accumulate: bool = False,
    differentiable: bool = False,
    unit: str | None = None,
    exclude_prefix: bool | None = None,
    keep: Sequence[str] = (),
) -> Capture:
    """See what the heads of a model do; a context manager that gives ``RecordedHeads``.

    Takes any module whose attention calls ``F.scaled_dot_product_attention``: timm, transformers, torchvision's ViT,
    ``torch.nn.MultiheadAttention``, lightly, your own. Inside the block these calls are computed by
    ``mimkernels.attention``, which gives the same result and the statistics from the same pass; N x N maps are never
    stored. Modules with a fused and a plain branch take the fused one, and compiled models run uncompiled, inside the
    block only. What the kernels do not take (dropout, heads wider than 128, attention inside gradient checkpointing,
    ``need_weights=True``) is computed as it would be without this, and its statistics, before dropout, beside it;
    those of wide heads store the map while they are computed. Of tensors that compute attention in their own way
    (nested tensors, masks of unknown classes) there are no statistics. Patches that a mask hides from every query are
    padding, as in a batch of images of several sizes: statistics over images are those of the other patches, ``stats``
    of a layer has a row for each and ``padding`` says which. ``notes`` of the layer say so.

    Seen is what the thread and asyncio task that enter the block run inside it; the same model may run, and be
    captured, in others at the same time.

    Args:
        model: called inside the block, as a whole or in parts, any number of times. Attention elsewhere is not seen.
        stats: names of quantities (see ``mimkernels.heads.QUANTITIES``) and presets (``PRESETS``), one or several.
        positions: where patches lie, for distances. "auto": as the patch embedding of the model (timm, transformers,
            torchvision) laid out the images that it got last inside the block, less the patches that were dropped
            since, and windows by ``window_size``; or patches per axis, ``(14, 14)``; or coordinates as of
            ``attention``, ``[N - P, d]`` or ``[B, N - P, d]``, such as ``grid_positions[ids_keep]`` of a masked
            encoder.
        num_prefix: P, leading tokens that are no patches; "auto": from the model, where they and the patches that it
            embedded are all tokens that there are.
        layers: which to capture: a regular expression that their name must contain, or names (as in the result) and
            numbers in the order of calls; all if None.
        accumulate: keep only sums over images, for whole data sets; else also every row, ``[B, H, N]``.
        differentiable: rows keep their gradients, so that they can be terms of a loss.
        unit, exclude_prefix: as of ``HeadStatistics``.
        keep: what to keep of the last call of every layer, of "q", "k" and "lse", for the companion ops; of some images
            alone, if ``kept_images`` of the result names them.

    Raises:
        ValueError: an unknown statistic, or a layout that must be given; inside, a layer whose tokens do not fit the
            layout, or whose layout was not seen and must be given.
        RuntimeError: on leaving, nothing was captured: says which modules looked like attention and why they were
            missed.

    Example::

        with mimkernels.capture(model, ["entropy", "distance"]) as heads:
            model(images)
        print(heads.table())
        heads["blocks.0.attn"].stats["entropy"]  # [B, H, N]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"capture takes a module, got {type(model).__name__}")
    model = unwrapped(model)
    if accumulate and differentiable:
        raise ValueError("accumulate=True keeps no rows that could be differentiable")
    names = [stats] if isinstance(stats, str | Preset) or not isinstance(stats, Iterable) else list(stats)
    for item in names:
        if not isinstance(item, str | Preset):
            raise TypeError(f"capture takes names of statistics and presets, got {type(item).__name__} {item!r:.60}")
    presets = [item for item in names if isinstance(item, Preset) or item in PRESETS]
    quantities = [item for item in names if isinstance(item, str) and item not in presets]
    unknown = [name for name in quantities if name not in QUANTITIES]
    if unknown or not names:
        raise ValueError(
            f"unknown statistic {unknown[0]!r}; known: {', '.join(QUANTITIES)}; presets: {', '.join(PRESETS)}"
            if unknown
            else "capture needs at least one statistic"
        )
    # With a prefix token, so that all quantities are accepted: layers without one go without theirs.
    wanted = HeadStatistics(presets, quantities=quantities, num_prefix=1, unit=unit, exclude_prefix=exclude_prefix)
    unseen = [name for name in wanted.names if {"tokens", "output"} & set(QUANTITIES[name].inputs)]
    if unseen:
        raise ValueError(f"{unseen[0]} is of tokens outside attention, which capture cannot see; use HeadStatistics")
    layouts = Layouts(model)
    places = _Places(model, layouts, wanted, positions, num_prefix)
    parts = None if isinstance(keep, str) or not isinstance(keep, Iterable) else list(keep)
    if parts is None or not all(isinstance(part, str) and part in ("q", "k", "lse") for part in parts):
        raise ValueError(f"capture keeps of q, k, lse what it is told, as in keep=('q', 'k'), got {keep!r}")
    return Capture(model, wanted, presets, layouts, places, Choice(layers), accumulate, differentiable, parts)


class Capture(FunctionObserver):
    """What ``capture`` returns: enter it once."""

    def __init__(
        self,
        model: nn.Module,
        wanted: HeadStatistics,
        presets: Sequence[str | Preset],
        layouts: Layouts,
        places: _Places,
        choice: Choice,
        accumulate: bool,
        differentiable: bool,
        keep: Sequence[str] = (),
    ) -> None:
        self._model = model
        self._wanted = wanted
        self._presets = presets
        self._layouts = layouts
        self._places = places
        self._choice = choice
        self._differentiable = differentiable
        self._recorder = HeadRecorder(keep, rows=not accumulate, differentiable=differentiable)
        self._heads = RecordedHeads()
        self._calls = Calls(model, self, layouts.left)
        self._open: ExitStack | None = None

    @untraced
    def __enter__(self) -> RecordedHeads:
        if self._open is not None:
            raise RuntimeError("this capture was used before; call capture again")
        self._open = intercepted(self._model, self, self._calls.followed())
        return self._heads

    @untraced
    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        assert self._open is not None
        self._open.close()
        if kind is not None:
            return
        self._heads.missed.update(self._calls.missed())
        if not self._heads:
            raise RuntimeError(self._calls.nothing_seen(self._choice))
        if not self._heads.groups:
            raise RuntimeError(f"no layer has any of the statistics asked for:\n{self._heads.table()}")
        unmet = self._calls.unmet(self._choice)
        if unmet:
            raise RuntimeError(unmet)

    # As an observer of `mimkernels.nn.sdpa`

    def run(self, call: AttentionCall) -> AttentionOutput:
        layer = self._layer()
        if layer is None:
            return call.compute()
        if transformed():
            layer.add_note(_TRANSFORMED)
            return call.compute()
        here = self._by_heads(layer, call)
        plan = self._plan(layer, here.call)
        output = here.call.compute(**plan.request.options)
        self._write(layer, plan, here.call, output)
        return here.restored(output, call)

    def watch(self, call: AttentionCall | None, note: str = "") -> None:
        layer = self._layer()
        if layer is None:
            return
        layer.add_note(note)
        if call is None:
            return
        if transformed():
            layer.add_note(_TRANSFORMED)
            return
        if self._differentiable and keeps_tensors_elsewhere():
            raise RuntimeError(
                f"{layer.name} runs inside gradient checkpointing, where statistics cannot be differentiable: use "
                "mimkernels.heads.record_heads, or switch checkpointing off"
            )
        with nullcontext() if self._differentiable else torch.no_grad():
            call = self._by_heads(layer, call).call
            plan = self._plan(layer, call)
            if plan.names:
                self._write(layer, plan, call, call.compute(**plan.request.options))

    def see_patches(self, embedding: nn.Module, patches: Patches) -> None:
        self._layouts.see(embedding, patches)

    # What `Interception` tells

    @property
    def runs(self) -> bool:
        return bool(self._calls.modules)

    def note(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        if func in LAYOUT_FUNCTIONS:
            self._layouts.note(func, args, kwargs, result, self._calls.modules)
        elif isinstance(result, Tensor):
            self._calls.note_softmax(result.shape)

    def _layer(self) -> LayerHeads | None:
        """That of a call made now, or None if it is not to be captured; asked once for every call."""
        if not self._calls.modules:
            return None
        name, index = self._calls.count()
        if not self._choice.takes(name, index):
            return None
        return self._heads._layers.setdefault(name, LayerHeads(name, index))

    def _by_heads(self, layer: LayerHeads, call: AttentionCall) -> Arranged:
        here = arranged(call, self._calls.modules[0])
        layer.add_note(here.note)
        return here

    def _plan(self, layer: LayerHeads, call: AttentionCall) -> _Plan:
        layer.set_sizes(call)
        queries, keys = layer.queries, layer.keys
        layer.num_prefix, positions, layer.windows, note = self._places.of(self._calls, call, layer.name)
        layer.add_note(note)
        reasons = {name: _cannot_have(name, queries, keys, layer.num_prefix) for name in self._wanted.names}
        layer.missing.update((name, reason) for name, reason in reasons.items() if reason)
        names = tuple(name for name, reason in reasons.items() if not reason)
        request = StatisticsRequest(required_stats(names), layer.num_prefix, positions)
        return _Plan(names, request, queries == keys)

    def _write(self, layer: LayerHeads, plan: _Plan, call: AttentionCall, output: AttentionOutput) -> None:
        if not plan.names:
            return
        padding = padding_of(call, layer.num_prefix) if layer.windows == 1 else None
        rows = self._recorder.write(layer, call, output, self._heads.kept_images, padding)
        layer.add_note(_PADDED if padding is not None else "")
        group = self._group(plan)
        for part, lse, of in without_padding(padding, layer.num_prefix, rows, output.lse, call):
            group.update(layer.index, part, q=of.q, k=of.k, v=of.v, lse=lse, windows=layer.windows, **of.options)

    def _group(self, plan: _Plan) -> HeadStatistics:
        # Of cross-attention's queries, none are known to be prefix tokens.
        key = plan.names, plan.request.num_prefix if plan.is_self_attention else 0
        if key not in self._heads._groups:
            presets = self._presets if plan.names == self._wanted.names else ()
            self._heads._groups[key] = HeadStatistics(
                presets,
                quantities=plan.names,
                num_prefix=key[1],
                unit=self._wanted.unit,
                exclude_prefix=self._wanted.exclude_prefix,
            )
        return self._heads._groups[key]


class _Plan(NamedTuple):
    """What is computed of one call, and for which quantities."""

    names: tuple[str, ...]
    request: StatisticsRequest
    is_self_attention: bool


def _cannot_have(name: str, queries: int, keys: int, num_prefix: int) -> str:
    if queries == 0:
        return "no queries"
    if queries != keys:
        per_token = {"self_mass", "distance"} & set(QUANTITIES[name].row_stats)
        among = name in ("nmi", "normalized_entropy", "patch_head_divergence", "argmax_is_prefix")
        if per_token or among or name.startswith(("cls_", "pos_", "sink_")):
            return f"cross-attention: {queries} queries, {keys} keys"
    elif num_prefix >= keys:
        return f"no patch tokens: {keys} tokens, {num_prefix} of them prefix"
    return "no [cls] token" if name.startswith("cls_") and num_prefix == 0 else ""


class _Places:
    """Prefix tokens and positions of every layer."""

    def __init__(
        self,
        model: nn.Module,
        layouts: Layouts,
        wanted: HeadStatistics,
        positions: str | Sequence[int] | Tensor,
        num_prefix: str | int,
    ) -> None:
        self._layouts = layouts
        if isinstance(positions, Tensor):
            fits = positions.dim() in (2, 3)
        else:
            grid = isinstance(positions, Sequence) and len(positions) > 0
            fits = positions == "auto" or (grid and all(isinstance(side, int) and side > 0 for side in positions))
        if not fits:
            got = list(positions.shape) if isinstance(positions, Tensor) else positions
            raise ValueError(
                'positions must be "auto", patches per axis such as (14, 14), or coordinates [N, d] or [B, N, d], got '
                f"{got!r}"
            )
        self._num_prefix = None if isinstance(num_prefix, str) else num_prefix
        self._given = positions if isinstance(positions, Tensor) else None
        self._grid = None if isinstance(positions, Tensor | str) else tuple(positions)
        self._unit = wanted.unit
        self._needed = "distance" in wanted.row_stats
        self._positions: dict[tuple[object, ...], Tensor] = {}
        if num_prefix != "auto" and (type(num_prefix) is not int or num_prefix < 0):
            raise ValueError(f'num_prefix must be "auto" or a number of tokens, got {num_prefix!r}')
        unknown = "num_prefix" if self._num_prefix is None else ""
        if self._needed and self._given is None and self._grid is None:
            unknown = unknown or "positions"
        if unknown and not layouts.parts:
            example = "num_prefix=1 with one [cls] token" if unknown == "num_prefix" else "positions=(14, 14)"
            raise ValueError(
                f"{unknown} of {type(model).__name__} is not known: no patch embedding is found in it (as timm's "
                "patch_embed, or a convolution of the patch_size that a transformers model is configured for); give "
                f"it, such as {example}"
            )

    def of(self, calls: Calls, call: AttentionCall, layer: str) -> tuple[int, Tensor | None, int, str]:
        """``num_prefix``, ``positions`` and windows per image of a call made now, and what to note of these."""
        batch, _, keys, _ = call.k.shape
        place = self._layouts.place(calls.modules, batch, keys, self._num_prefix, calls.images)
        prefix, patches, why, windows, note = place
        if prefix is None:
            raise ValueError(f"{layer}: num_prefix is not known: {why}: give it, or use layers= to leave it out")
        if prefix > keys:
            raise ValueError(f"{layer}: {keys} tokens, but num_prefix is {prefix}")
        if not self._needed or call.q.shape[2] != keys:
            return prefix, None, windows, note
        if self._given is not None:
            return prefix, self._given_positions(prefix, call, layer), windows, note
        if self._grid is not None:
            patches = self._layouts.of_grid(calls.modules, batch, self._grid)
            fits = keys == prefix + math.prod(patches.grid)
            why = "" if fits else f"{keys} tokens, but {described(prefix, patches.grid)}"
        ids = None if patches is None else patches.ids
        if ids is not None and len(ids) != batch:
            why = why or f"{batch} images, but {len(ids)} were embedded"
        if why or patches is None:
            raise ValueError(
                f"{layer}: {why}: give positions and num_prefix (of a masked encoder, the kept patches' coordinates "
                "per image), or use layers= to leave it out"
            )
        return prefix, self._positions_of(patches, call.q.device), windows, note

    def _given_positions(self, prefix: int, call: AttentionCall, layer: str) -> Tensor:
        batch, keys = call.k.shape[0], call.k.shape[2]
        assert self._given is not None
        *images, places, _ = self._given.shape
        if places not in (keys, keys - prefix) or images not in ([], [1], [batch]):
            raise ValueError(
                f"{layer}: {keys} tokens of {batch} images, {prefix} of them prefix, but positions are "
                f"{list(self._given.shape)}"
            )
        key = ("given", call.q.device)
        if key not in self._positions:
            self._positions[key] = self._given.to(call.q.device)
        return self._positions[key]

    def _positions_of(self, patches: Patches, device: torch.device) -> Tensor:
        if patches.ids is None:
            return self._grid_positions(patches, device)
        if patches.grids is None or self._unit != "unit":
            return self._grid_positions(patches, device)[patches.ids]
        columns = patches.grid[1]
        places = torch.stack((patches.ids // columns, patches.ids % columns), dim=-1).to(device)
        return places / (patches.grids.to(device) - 1).clamp(min=1)[:, None]  # of each image's own sides

    def _grid_positions(self, patches: Patches, device: torch.device) -> Tensor:
        if self._unit == "pixel" and patches.patch_size is None:
            raise ValueError(
                f"distances in pixels of {shown_grid(patches.grid)} patches need the patch size, which is not known: "
                "give positions in pixels, or unit='patch'"
            )
        size = patches.patch_size if self._unit == "pixel" else None
        key = patches.grid, size, device
        if key not in self._positions:
            self._positions[key] = patch_grid_positions(patches.grid, self._unit, size, device=device)
        return self._positions[key]
