"""Pictures of head statistics, as in the papers: one dot per head, a line through the layers' means."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimkernels._palette import CHART, INK, LINE, MUTED, SERIES
from mimkernels.heads.presets import find_quantity
from mimkernels.heads.statistics import HeadStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_cka", "plot_heads", "plot_overview"]

OVERVIEW = ("distance", "renormalized_distance", "entropy", "head_divergence", "prefix_mass")


def plot_heads(
    recorded: HeadStatistics | Mapping[str, HeadStatistics],
    quantity: str,
    *,
    title: str | None = None,
    share_y: bool = True,
) -> Figure:
    """One quantity over the layers: a dot per head, a line through the layers' means.

    Args:
        recorded: the statistics, or several by name (models, epochs): a panel each, side by side.
        quantity: a name in ``QUANTITIES`` that all of them recorded.
        title: above the picture, or None.
        share_y: panels have the same vertical axis, so that heights compare.

    Returns:
        a matplotlib ``Figure``, not shown and not known to pyplot: ``figure.savefig("distance.png", dpi=150)``.

    Raises:
        ValueError: nothing was recorded, or not this quantity, or the panels' units differ.
        ImportError: matplotlib is missing.

    Source: the figures of arXiv:2010.11929, arXiv:2205.13543 and arXiv:2305.00729.
    """
    named = _named(recorded)
    label = _common_label(named, quantity)
    with _style():
        columns = min(len(named), 4)
        rows = math.ceil(len(named) / columns)
        figure = _figure(6.6 if columns == 1 else 0.9 + 3.7 * columns, 0.7 + 3.3 * rows)
        grid = figure.subplots(rows, columns, sharey=share_y, squeeze=False)
        for place, (axes, name) in enumerate(itertools.zip_longest(grid.flat, named)):
            if name is None:
                axes.set_visible(False)
                continue
            _draw(axes, named[name], quantity, SERIES[place % len(SERIES)])
            axes.set_ylim(*_limits(named.values() if share_y else [named[name]], quantity))
            axes.set_title(name)
            if place % columns == 0 or not share_y:
                axes.set_ylabel(label)
            if place + columns >= len(named):
                axes.set_xlabel("layer")
        _finish(figure, title)
    return figure


def plot_overview(
    recorded: HeadStatistics | Mapping[str, HeadStatistics],
    quantities: Sequence[str] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Several quantities at once. Several models or epochs stand side by side, a row for each quantity with one axis.

    Args:
        recorded: the statistics, or several by name.
        quantities: which to show; if None, those of distance, entropy, head divergence and mass on prefix tokens that
            all of them recorded, or everything if they recorded none of these.
        title: above the picture, or None.

    Returns:
        a matplotlib ``Figure``, as ``plot_heads``.

    Raises:
        ValueError: nothing was recorded, or not these quantities, or units differ.
        ImportError: matplotlib is missing.
    """
    named = _named(recorded)
    if quantities is None:
        common = [name for name in next(iter(named.values())).names if all(name in s.names for s in named.values())]
        quantities = [name for name in OVERVIEW if name in common] or common
        if "distance" in quantities and "renormalized_distance" in quantities:
            quantities.remove("renormalized_distance")
    if not quantities:
        raise ValueError("the statistics have no quantity in common")
    for quantity in quantities:
        _common_label(named, quantity)
    one = len(named) == 1
    if one:
        columns = 2 if len(quantities) in (2, 4) else min(3, len(quantities))
        panels = [(next(iter(named)), quantity) for quantity in quantities]
    else:
        columns = len(named)
        panels = [(name, quantity) for quantity in quantities for name in named]
    rows = math.ceil(len(panels) / columns)
    order = list(named)
    with _style():
        width = 4.2 if columns <= 3 else max(2.4, 14 / columns)
        figure = _figure(0.8 + width * columns, 0.7 + 2.9 * rows)
        grid = figure.subplots(rows, columns, squeeze=False, sharey=False if one else "row")
        for place, (axes, panel) in enumerate(itertools.zip_longest(grid.flat, panels)):
            if panel is None:
                axes.set_visible(False)
                continue
            name, quantity = panel
            _draw(axes, named[name], quantity, SERIES[order.index(name) % len(SERIES)])
            axes.set_ylim(*_limits(named.values(), quantity))
            if one or place % columns == 0:
                axes.set_ylabel(_common_label(named, quantity))
            if not one and place < columns:
                axes.set_title(name)
            if place + columns >= len(panels):
                axes.set_xlabel("layer")
        _finish(figure, title or (order[0] if one else None))
    return figure


def plot_cka(
    similarity: Tensor,
    *,
    x_name: str = "layer",
    y_name: str = "layer",
    title: str | None = None,
) -> Figure:
    """CKA between layers as a map, the first layer at the lower left, as in the papers.

    Args:
        similarity: ``[A, B]`` from ``CKA.result``.
        x_name, y_name: what the B columns and the A rows are, such as ``"layer of MAE"``.
        title: above the picture, or None.

    Returns:
        a matplotlib ``Figure``.
    """
    if similarity.dim() != 2:
        raise ValueError(f"similarity must be [A, B], got {list(similarity.shape)}")
    from matplotlib.ticker import MaxNLocator

    with _style():
        figure = _figure(5.6, 4.8)
        axes = figure.subplots()
        image = axes.imshow(similarity.numpy(force=True), origin="lower", cmap="magma", vmin=0, vmax=1)
        axes.set_xlabel(x_name)
        axes.set_ylabel(y_name)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(image, ax=axes, label="CKA", shrink=0.9)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        if title:
            figure.suptitle(title, color=INK, fontweight="bold")
    return figure


def _named(recorded: HeadStatistics | Mapping[str, HeadStatistics]) -> dict[str, HeadStatistics]:
    named = dict(recorded) if isinstance(recorded, Mapping) else {"": recorded}
    if not named:
        raise ValueError("nothing to plot: no statistics given")
    for name, seen in named.items():
        if not isinstance(seen, HeadStatistics):
            raise TypeError(
                f"HeadStatistics, or several by name, are drawn, got {type(seen).__name__}"
                + (f" by the name {name!r}" if name else "")
                + "; of what capture gives these are its `statistics`"
            )
        if not seen.layers:
            raise ValueError(f"nothing to plot: {name or 'these statistics'} recorded no layer")
    return named


def _common_label(named: Mapping[str, HeadStatistics], quantity: str) -> str:
    find_quantity(quantity)
    for name, seen in named.items():
        if quantity not in seen.names:
            raise ValueError(f"{name or 'these statistics'} did not record {quantity!r}: {', '.join(seen.names)}")
    labels = {seen.label_of(quantity) for seen in named.values()}
    if len(labels) > 1:
        raise ValueError(f"{quantity} is recorded in different units: {', '.join(sorted(labels))}")
    return labels.pop()


def _style() -> AbstractContextManager[None]:
    import matplotlib

    return matplotlib.rc_context(CHART)


def _figure(width: float, height: float) -> Figure:
    # An object of its own instead of pyplot: the caller's backend and figures stay as they are.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _draw(axes: Axes, seen: HeadStatistics, quantity: str, color: str) -> None:
    from matplotlib.ticker import MaxNLocator

    mean = seen.mean(quantity)  # [layers, H]
    layers = torch.tensor(seen.layers, dtype=torch.float64, device="cpu")
    if mean.shape[1] > 1:
        x = layers[:, None].expand_as(mean).flatten()
        axes.scatter(x, mean.flatten(), s=30, color=color, alpha=0.55, linewidths=0.5, edgecolors="white", zorder=2)
    axes.plot(layers, seen.layer_mean(quantity), color=INK, linewidth=1.6, marker="o", markersize=3, zorder=3)
    axes.set_xlim(layers[0].item() - 0.6, layers[-1].item() + 0.6)
    if len(layers) <= 12:
        axes.set_xticks(seen.layers)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=4))
    axes.grid(True, axis="y", color=LINE, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _limits(shown: Iterable[HeadStatistics], quantity: str) -> tuple[float, float]:
    """Of the vertical axis: all dots with room around them; from 0 unless that would flatten the differences."""
    values = torch.cat([seen.mean(quantity).flatten() for seen in shown])
    values = values[values.isfinite()]
    if not len(values):
        return 0.0, 1.0
    low, high = values.min().item(), values.max().item()
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    # Dots at 0 stay whole.
    return (-room / 2 if low < room else 0.0) if 0 <= low <= 0.6 * high else low - room, high + room


def _finish(figure: Figure, title: str | None) -> None:
    """Title, and a legend outside the panels, where it covers no dot."""
    from matplotlib.lines import Line2D

    dot = Line2D([], [], linestyle="", marker="o", markersize=6, color=MUTED, alpha=0.7, markeredgecolor="white")
    line = Line2D([], [], color=INK, linewidth=1.6, marker="o", markersize=3)
    figure.legend(
        [dot, line],
        ["one head", "mean over heads"],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        labelcolor=MUTED,
    )
    if title:
        figure.suptitle(title, color=INK, fontweight="bold")
