"""Pictures of head statistics, as in the papers: one dot per head, a line through the layers' means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimkernels.stats.presets import find_quantity
from mimkernels.stats.recorder import HeadStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_cka", "plot_heads", "plot_overview"]

INK, MUTED, LINE = "#1c2430", "#6b7685", "#d9dee5"
# One colour per model or epoch; told apart in print and by colour-blind readers (after Okabe and Ito).
COLORS = ("#0b66c3", "#d1570c", "#1b8a6b", "#a3478a", "#8a6d00", "#4c5c6e")
OVERVIEW = ("distance", "renormalized_distance", "entropy", "head_divergence", "prefix_mass")
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.fonttype": "path",
    "svg.hashsalt": "mimkernels",
}


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
        figure = _figure(1.6 + 3.9 * columns if columns > 1 else 6.4, 0.6 + 3.4 * rows)
        grid = figure.subplots(rows, columns, sharey=share_y, squeeze=False)
        for place, axes in enumerate(grid.flat):
            if place >= len(named):
                axes.set_visible(False)
                continue
            name, seen = list(named.items())[place]
            _draw(axes, seen, quantity, COLORS[place % len(COLORS)])
            if name:
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
    """Several quantities at once: a row of panels per model or epoch, a column per quantity; columns share their axis.

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
    if not quantities:
        raise ValueError("the statistics have no quantity in common")
    labels = [_common_label(named, quantity) for quantity in quantities]
    # One model: panels wrap after three. Several: a row each.
    columns = len(quantities) if len(named) > 1 else min(3, len(quantities))
    if len(named) == 1 and len(quantities) == 4:
        columns = 2
    rows = len(named) if len(named) > 1 else math.ceil(len(quantities) / columns)
    with _style():
        figure = _figure(0.6 + 4.3 * columns, 0.6 + 3.1 * rows)
        grid = figure.subplots(rows, columns, squeeze=False, sharey="col" if len(named) > 1 else False)
        for place, axes in enumerate(grid.flat):
            if len(named) == 1 and place >= len(quantities):
                axes.set_visible(False)
                continue
            row, column = divmod(place, columns)
            which = column if len(named) > 1 else place
            name, seen = list(named.items())[row if len(named) > 1 else 0]
            _draw(axes, seen, quantities[which], COLORS[(row if len(named) > 1 else 0) % len(COLORS)])
            axes.set_ylabel(labels[which])
            if name and column == 0:
                axes.set_title(name, loc="left", fontweight="bold")
            if (len(named) > 1 and row == rows - 1) or (len(named) == 1 and place + columns >= len(quantities)):
                axes.set_xlabel("layer")
        _finish(figure, title)
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
    named = {"": recorded} if isinstance(recorded, HeadStatistics) else dict(recorded)
    if not named:
        raise ValueError("nothing to plot: no statistics given")
    for name, seen in named.items():
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


def _style():
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _figure(width: float, height: float) -> Figure:
    # An object of its own instead of pyplot: the caller's backend and figures stay as they are.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _draw(axes: Axes, seen: HeadStatistics, quantity: str, color: str) -> None:
    from matplotlib.ticker import MaxNLocator

    mean = seen.mean(quantity)  # [layers, H]
    layers = torch.tensor(seen.layers, dtype=torch.float64)
    if mean.shape[1] > 1:
        x = layers[:, None].expand_as(mean).flatten()
        axes.scatter(x, mean.flatten(), s=30, color=color, alpha=0.55, linewidths=0.5, edgecolors="white", zorder=2)
    axes.plot(layers, seen.layer_mean(quantity), color=INK, linewidth=1.6, marker="_", markersize=9, zorder=3)
    axes.set_xlim(layers[0].item() - 0.6, layers[-1].item() + 0.6)
    if len(layers) <= 12:
        axes.set_xticks(seen.layers)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=4))
    finite = mean[mean.isfinite()]
    if len(finite) and finite.min() >= 0:
        axes.set_ylim(bottom=0)
    axes.grid(True, axis="y", color=LINE, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _finish(figure: Figure, title: str | None) -> None:
    """Title, and a legend outside the panels, where it covers no dot."""
    from matplotlib.lines import Line2D

    dot = Line2D([], [], linestyle="", marker="o", markersize=6, color=MUTED, alpha=0.7, markeredgecolor="white")
    line = Line2D([], [], color=INK, linewidth=1.6, marker="_", markersize=9)
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
