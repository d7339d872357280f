"""What ``capture`` gives: statistics by layer, as tables, pictures and plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from mimkernels.heads.plots import plot_heads, plot_overview
from mimkernels.heads.statistics import HeadStatistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CapturedHeads", "CapturedLayer"]


@dataclass
class CapturedLayer:
    """What one layer did.

    Attributes:
        name: the qualified name of the module that called attention; its second call in one forward pass is
            ``name#1``, and so on.
        index: the layer's number, in the order of calls.
        heads, queries, keys: sizes of the last call.
        num_prefix: leading keys that are no patches.
        missing: quantities that this layer cannot have, with the reason.
        notes: what to know about the numbers.
    """

    name: str
    index: int
    heads: int = 0
    queries: int = 0
    keys: int = 0
    num_prefix: int = 0
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _rows: list[dict[str, Tensor]] = field(default_factory=list, repr=False)

    @property
    def stats(self) -> dict[str, Tensor]:
        """Row statistics ``[B, H, Nq]`` fp32 by name, the images of all calls one after the other.

        Empty with ``accumulate=True``.

        Raises:
            ValueError: calls had different numbers of heads or queries.
        """
        if len(self._rows) == 1:
            return dict(self._rows[0])
        made = {}
        for name in dict.fromkeys(name for rows in self._rows for name in rows):
            parts = [rows[name] for rows in self._rows if name in rows]
            shapes = list(dict.fromkeys(tuple(part.shape[1:]) for part in parts))
            if len(shapes) > 1:
                raise ValueError(
                    f"{self.name} ran with different numbers of heads and queries, {list(shapes[0])} and "
                    f"{list(shapes[1])}: capture them one by one, or with accumulate=True"
                )
            made[name] = torch.cat(parts)
        return made

    def describe(self) -> dict:
        """Everything but the numbers, as plain Python."""
        names = ("index", "name", "heads", "queries", "keys", "num_prefix")
        sizes = {name: getattr(self, name) for name in names}
        return {**sizes, "missing": dict(self.missing), "notes": list(self.notes)}


class CapturedHeads(Mapping[str, CapturedLayer]):
    """The layers that were captured, by name, in the order of their calls; with their statistics over all images.

    ``heads["blocks.0.attn"].stats["entropy"]`` is ``[B, H, N]``. Readable while capturing.

    Attributes:
        groups: the accumulated ``HeadStatistics``, one object for all layers that have the same quantities and the
            same prefix tokens. Windows count as images.
        missed: modules that look like attention, ran, and were not seen, with the reason.
    """

    def __init__(self) -> None:
        self._layers: dict[str, CapturedLayer] = {}
        self._groups: dict[tuple[tuple[str, ...], int], HeadStatistics] = {}
        self.missed: dict[str, str] = {}

    def __getitem__(self, layer: str | int) -> CapturedLayer:
        """A layer by its name, or by its place among the captured ones."""
        if isinstance(layer, int):
            return list(self._layers.values())[layer]
        if layer not in self._layers:
            raise KeyError(f"{layer!r} was not captured; captured: {', '.join(self._layers) or 'nothing yet'}")
        return self._layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def stats(self) -> list[dict[str, Tensor]]:
        """The row statistics of every layer, as ``regularization_loss`` takes them."""
        return [layer.stats for layer in self.values()]

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
            prefix = f", {layer.num_prefix} of them prefix" if layer.num_prefix else ""
            tokens = f"{layer.keys}" if layer.queries == layer.keys else f"{layer.queries} on {layer.keys}"
            lines.append(f"{layer.index:5d}  {layer.name.ljust(width)}  {layer.heads} heads, {tokens} tokens{prefix}")
            reasons = dict.fromkeys(layer.missing.values())
            for reason in reasons:
                names = ", ".join(name for name, why in layer.missing.items() if why == reason)
                lines.append(f"       without {names}: {reason}")
            lines += [f"       {note}" for note in layer.notes]
        lines += [f"not captured: {name}: {why}" for name, why in self.missed.items()]
        return "\n".join(lines) if lines else "no layer captured yet"

    def to_dict(self) -> dict:
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

    def reduce(self, group: dist.ProcessGroup | None = None) -> CapturedHeads:
        """The statistics over all processes of ``torch.distributed``, as a new object without row statistics.

        Every process of the group must call it; some may have seen other layers. Without a process group, a copy.

        Raises:
            ValueError: processes disagree about a layer's heads.
        """
        mine = self.to_dict()
        settings = {key: {**each.to_dict(), "layers": {}} for key, each in self._groups.items()}
        processes: list = [(mine["layers"], mine["missed"], settings)]
        if dist.is_available() and dist.is_initialized():
            processes = [None] * dist.get_world_size(group)
            dist.all_gather_object(processes, (mine["layers"], mine["missed"], settings), group=group)
        made = CapturedHeads()
        for layers, missed, groups in processes:
            made.missed.update(missed)
            settings = {**groups, **settings}
            for layer in layers:
                ours = made._layers.setdefault(layer["name"], CapturedLayer(**{**layer, "index": len(made._layers)}))
                ours.missing.update(layer["missing"])
                ours.notes = list(dict.fromkeys((*ours.notes, *layer["notes"])))
        numbers = {layer.index: made._layers[layer.name].index for layer in self.values()}
        for key in sorted(settings):  # the same order in every process
            here = self._groups[key].to_dict() if key in self._groups else settings[key]
            here["layers"] = {str(numbers[int(number)]): values for number, values in here["layers"].items()}
            made._groups[key] = HeadStatistics.from_dict(here).reduce(group)
        return made

    def __repr__(self) -> str:
        return f"CapturedHeads({len(self)} layers; {'; '.join(map(repr, self.groups))})"
