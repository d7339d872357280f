"""What was recorded of a model's heads, and ``record_heads`` for models whose attention is ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mimkernels.heads.calls import named_parts, unwrapped
from mimkernels.heads.plots import plot_heads, plot_overview
from mimkernels.heads.statistics import HeadStatistics
from mimkernels.nn.processes import gather_objects
from mimkernels.nn.recorder import LayerHeads, LayerRecorder
from mimkernels.nn.windows import window_positions

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.distributed import ProcessGroup

__all__ = ["LayerHeads", "RecordedHeads", "record_heads"]


class RecordedHeads(Mapping[str, LayerHeads]):
    """What heads did, by layer: a mapping of names to ``LayerHeads`` in their order, and statistics over all images.

    ``heads["blocks.0.attn"].stats["entropy"]`` is ``[B, H, N]``; ``heads[0]`` is the first layer. Readable as soon as
    a layer has run. Statistics over images are those of ``capture``; ``record_heads`` keeps rows alone.

    Attributes:
        groups: the accumulated ``HeadStatistics``, one object for all layers that have the same quantities and the
            same prefix tokens. Of an image's windows, the mean counts.
        missed: modules that look like attention, ran, and were not seen, with the reason.
        kept_images: numbers of the images of a call whose q, k and lse ``capture(keep=...)`` keeps, which may be set
            before each call; None: of all.
    """

    def __init__(self, layers: Iterable[LayerHeads] = ()) -> None:
        self._layers: dict[str, LayerHeads] = {layer.name: layer for layer in layers}
        self._groups: dict[tuple[tuple[str, ...], int], HeadStatistics] = {}
        self.missed: dict[str, str] = {}
        self.kept_images: Sequence[int] | None = None

    def __getitem__(self, layer: str | int) -> LayerHeads:
        """A layer by its name, or by its place among the recorded ones."""
        if isinstance(layer, int):
            heads = list(self._layers.values())[layer]
        elif layer in self._layers:
            heads = self._layers[layer]
        else:
            raise KeyError(f"{layer!r} was not captured; captured: {', '.join(self._layers) or 'nothing yet'}")
        if not heads.has_run:
            raise RuntimeError(f"layer {heads.index} of {len(self)} has not run inside record_heads yet")
        return heads

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def stats(self) -> list[dict[str, Tensor]]:
        """The row statistics of every layer, as ``regularization_loss`` takes them."""
        return [self[number].stats for number in range(len(self))]

    @property
    def groups(self) -> list[HeadStatistics]:
        return list(self._groups.values())

    @property
    def statistics(self) -> HeadStatistics:
        """Means and variances over images, per layer and head; of the largest group if there are several.

        Raises:
            RuntimeError: nothing was captured yet.
        """
        if not self._groups:
            raise RuntimeError("nothing was captured yet")
        return max(self.groups, key=lambda group: len(group.layers))

    def table(self) -> str:
        """Text for people: each quantity by layer, the layers' names, and what is missing and why."""
        lines = [group.table() + "\n" for group in self.groups]
        width = max((len(name) for name in self), default=0)
        for layer in self.values():
            more = f", {layer.num_prefix} of them prefix" if layer.num_prefix else ""
            more += f", {layer.windows} windows" if layer.windows > 1 else ""
            tokens = f"{layer.keys}" if layer.queries == layer.keys else f"{layer.queries} on {layer.keys}"
            lines.append(f"{layer.index:5d}  {layer.name.ljust(width)}  {layer.heads} heads, {tokens} tokens{more}")
            reasons = dict.fromkeys(layer.missing.values())
            for reason in reasons:
                names = ", ".join(name for name, why in layer.missing.items() if why == reason)
                lines.append(f"       without {names}: {reason}")
            lines += [f"       {note}" for note in layer.notes]
        lines += [f"not captured: {name}: {why}" for name, why in self.missed.items()]
        return "\n".join(lines) if lines else "no layer captured yet"

    def to_dict(self) -> dict[str, Any]:
        """Layers, statistics (as ``HeadStatistics.from_dict`` takes them) and what was missed, for JSON."""
        return {
            "format": 1,
            "layers": [layer.describe() for layer in self.values()],
            "statistics": [group.to_dict() for group in self.groups],
            "missed": dict(self.missed),
        }

    def plot(self, quantity: str | None = None, *, title: str | None = None) -> Figure:
        """One quantity over the layers, or the most telling ones; see ``mimkernels.heads.plot_heads``.

        Layers that have the quantity but other prefix tokens or quantities than the rest get a panel of their own.

        Raises:
            ValueError: no layer has the quantity.
        """
        if quantity is None:
            return plot_overview(self.statistics, title=title)
        shown = [group for group in self.groups if quantity in group.names]
        if not shown:
            known = dict.fromkeys(name for group in self.groups for name in group.names)
            raise ValueError(f"no layer has {quantity!r}; captured: {', '.join(known) or 'nothing yet'}")
        named = {f"layers {group.layers[0]} to {group.layers[-1]}": group for group in shown}
        return plot_heads(shown[0] if len(shown) == 1 else named, quantity, title=title)

    def reduce(self, group: ProcessGroup | None = None) -> RecordedHeads:
        """The statistics over all processes of ``torch.distributed``, as a new object without row statistics.

        Every process of the group must call it; some may have seen other layers. Without a process group, a copy.

        Raises:
            ValueError: processes disagree about a layer's heads.
        """
        mine = self.to_dict()
        settings = {key: {**each.to_dict(), "layers": {}} for key, each in self._groups.items()}
        total = RecordedHeads()
        for layers, missed, groups in gather_objects((mine["layers"], mine["missed"], settings), group):
            total.missed.update(missed)
            settings = {**groups, **settings}
            for layer in layers:
                merged = total._layers.setdefault(layer["name"], LayerHeads(**{**layer, "index": len(total._layers)}))
                merged.missing.update(layer["missing"])
                merged.notes = list(dict.fromkeys((*merged.notes, *layer["notes"])))
        numbers = {layer.index: total._layers[layer.name].index for layer in self.values()}
        for key in sorted(settings):  # the same order in every process
            group_data = self._groups[key].to_dict() if key in self._groups else settings[key]
            group_data["layers"] = {str(numbers[int(number)]): sums for number, sums in group_data["layers"].items()}
            total._groups[key] = HeadStatistics.from_dict(group_data).reduce(group)
        return total

    def __repr__(self) -> str:
        return f"RecordedHeads({len(self)} layers; {'; '.join(map(repr, self.groups))})"


def record_heads(
    model: nn.Module | Iterable[nn.Module],
    stats: Sequence[str] = (),
    *,
    num_prefix: int = 0,
    positions: Tensor | None = None,
    keep: Sequence[str] = (),
) -> LayerRecorder:
    """Record what the heads of a model do during one forward pass of this thread: gives ``RecordedHeads``.

    A context manager for models with attention by ``use_mimkernels_attention``, also compiled ones; ``capture`` takes
    any other. Statistics come out of the attention pass itself and carry gradients, so that they can be terms of the
    loss. Nothing stays behind in the model. Gradient checkpointing must be non-reentrant (timm's and torch's default);
    two passes with different positions may then not wait for their backward passes at once, which is refused. Of
    layers in windows (Swin), every window counts as an image: rows are ``[B * nW, H, N]``, the windows of an image one
    after the other.

    Args:
        model: with attention by ``use_mimkernels_attention``; or several modules, such as its blocks.
        stats: row statistics of ``attention`` to record.
        num_prefix: P, leading tokens ([cls], registers) that are no patches.
        positions: patch coordinates ``[N - P, d]`` or ``[B, N - P, d]``, for ``distance``; as in ``attention``. None:
            of timm's Swin, rows and columns in the layer's own grid; shifted windows are rolled back, and what their
            mask cuts from each other is as far apart as in the image.
        keep: what else to keep, of "q", "k", "lse", "output"; such as ``HeadStatistics.inputs``. The companion ops
            need q, k and lse.

    Raises:
        ValueError: an unknown name, or no layer that could record.
        RuntimeError: on leaving, layers that recorded nothing, or without gradients though in training; inside,
            a layer that runs twice, attention dropout, nesting.

    Example::

        use_mimkernels_attention(model)
        with record_heads(model, ["entropy"], num_prefix=1) as heads:
            loss = criterion(model(images), labels)
        loss = loss + regularization_loss({"entropy": 1e-3}, heads.stats, num_prefix=1)
    """
    from mimkernels.nn.attention import attention_layers  # needs timm, which capture does not

    single = isinstance(model, nn.Module) or not isinstance(model, Iterable)
    modules: list[Any] = [model] if isinstance(model, nn.Module) or not isinstance(model, Iterable) else list(model)
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"record_heads takes a module or several, got {type(module).__name__}")
    if positions is not None and (not isinstance(positions, Tensor) or positions.dim() not in (2, 3)):
        got = list(positions.shape) if isinstance(positions, Tensor) else type(positions).__name__
        raise ValueError(f"positions must be coordinates [N, d] or [B, N, d] in a tensor, got {got}")
    layers = attention_layers(*modules)
    places = (
        window_positions(modules, layers)
        if positions is None and isinstance(stats, Iterable) and "distance" in stats
        else positions
    )
    names: dict[nn.Module, str] = {}
    for number, module in enumerate(map(unwrapped, modules)):
        for name, part in named_parts(module):
            if not single:
                name = f"{number}.{name}" if name else str(number)
            names.setdefault(part, name or type(part).__name__)
    return _HeadRecording(
        layers, stats, names=[names[layer] for layer in layers], num_prefix=num_prefix, positions=places, keep=keep
    )


class _HeadRecording(LayerRecorder):
    """What ``record_heads`` returns: enter it once."""

    def __enter__(self) -> RecordedHeads:
        return RecordedHeads(super().__enter__())
