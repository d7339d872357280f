"""The figures of an analysis as SVG: a panel for every model on one scale, or a line for every model in one panel."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from markupsafe import Markup
from torch import Tensor

from mimkernels._palette import CHART, INK, LINE, MUTED, SERIES
from mimkernels.commands.analyze.series import Series, limits
from mimkernels.engine.figures import bare_map, colour_bar, named_panel, panel, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL = (4.3, 3.3)
_WIDE = (5.0, 3.2)


def colour_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for every model, the same in all figures."""
    return {name: SERIES[number % len(SERIES)] for number, name in enumerate(names)}


def head_panels(series: Sequence[Series], label: str, x_label: str, colours: Mapping[str, str]) -> list[Markup]:
    """A panel for every model, all on one scale: a dot per head, a line through the layers' means, a band of sd."""
    low, high = limits(series)
    return [_head_panel(one, label, x_label, colours[one.name], (low, high)) for one in series]


def _head_panel(one: Series, label: str, x_label: str, colour: str, y: tuple[float, float]) -> Markup:
    import matplotlib

    with matplotlib.rc_context(CHART):
        axes = panel(_PANEL)
        if one.heads is not None and one.heads.shape[2] > 1:
            x = one.x[None, :, None].expand_as(one.heads).flatten()
            axes.scatter(x, one.heads.flatten(), s=22, color=colour, alpha=0.5, linewidths=0.4, edgecolors="white",
                         zorder=2)  # fmt: skip
        _line(axes, one, colour, INK)
        axes.set_title(one.name, loc="left", fontweight="bold", color=colour)
        return _finished(axes, label, x_label, one.x, y)


def lines(
    series: Sequence[Series],
    label: str,
    x_label: str,
    colours: Mapping[str, str],
    *,
    references: Mapping[str, float] | None = None,
) -> Markup:
    """A line for every model in one panel, its name beside its end.

    Args:
        references: values with their names, drawn as dashed lines.
    """
    import matplotlib

    references = references or {}
    y = limits(series, heads=False, also=list(references.values()))
    with matplotlib.rc_context(CHART):
        axes = named_panel(_WIDE, {one.name: colours[one.name] for one in series})
        for text, value in references.items():
            axes.axhline(value, color=MUTED, linewidth=1.2, linestyle=(0, (5, 4)), zorder=1)
            axes.annotate(text, (0.0, value), xycoords=("axes fraction", "data"), xytext=(4, 3),
                          textcoords="offset points", color=MUTED, fontsize=9.5)  # fmt: skip
        for one in series:
            _line(axes, one, colours[one.name], colours[one.name])
        x = torch.cat([one.x for one in series]).unique()
        return _finished(axes, label, x_label, x, y)


def cka_maps(maps: Mapping[str, Tensor]) -> list[Markup]:
    """CKA between layers, ``[A, B]`` each by its title; the first layer at the lower left."""
    import matplotlib

    drawn = []
    for title, similarity in maps.items():
        with matplotlib.rc_context(CHART):
            axes = panel((4.3, 3.7), bar=True)
            image = axes.imshow(similarity.numpy(), origin="lower", cmap="magma", vmin=0, vmax=1, aspect="auto")
            first, _, second = title.partition(" | ")
            axes.set_xlabel(f"layer of {second or first}")
            axes.set_ylabel(f"layer of {first}")
            bare_map(axes)
            colour_bar(axes, image, "CKA")
            drawn.append(svg(axes.figure))  # type: ignore[arg-type]
    return drawn


def importance_maps(importance: Mapping[str, Tensor]) -> list[Markup]:
    """What taking out a head changes, ``[L, H]`` of every model by its name, on one scale; layer 1 at the bottom.

    NaN where a layer has fewer heads.
    """
    import matplotlib
    from matplotlib.colors import LogNorm

    highest = max(values.nan_to_num(0).max().item() for values in importance.values()) or 1.0
    # A few heads of early layers change far more than all others; three decades show those, too.
    norm = LogNorm(highest / 1000, highest, clip=True)
    drawn = []
    for name, values in importance.items():
        with matplotlib.rc_context(CHART):
            axes = panel((4.3, 3.7), bar=True)
            layers, heads = values.shape
            extent = (0.5, heads + 0.5, 0.5, layers + 0.5)
            image = axes.imshow(values.numpy(), origin="lower", cmap="magma", norm=norm, aspect="auto", extent=extent)
            axes.set_title(name, loc="left", fontweight="bold")
            axes.set_xlabel("head")
            axes.set_ylabel("layer")
            bare_map(axes)
            colour_bar(axes, image, "1 - cosine")
            drawn.append(svg(axes.figure))  # type: ignore[arg-type]
    return drawn


def _line(axes: "Axes", one: Series, band: str, colour: str) -> None:
    mean = one.mean
    if one.spread.isfinite().any():
        axes.fill_between(one.x, *one.band, color=band, alpha=0.13, linewidth=0, zorder=1)
    if len(one.runs) > 1:
        for run in one.runs:
            axes.plot(one.x, run, color=band, linewidth=0.8, alpha=0.8, zorder=2)
    axes.plot(one.x, mean, color=colour, linewidth=2.0, marker="o", markersize=3.5, zorder=3)


def _finished(axes: "Axes", label: str, x_label: str, x: Tensor, y: tuple[float, float]) -> Markup:
    from matplotlib.ticker import MaxNLocator

    room = 0.04 * (x.max() - x.min()).item() or 0.5
    axes.set_xlim(x.min().item() - room, x.max().item() + room)
    axes.set_ylim(*y)
    if x_label.startswith("layer"):
        if len(x) <= 13:
            axes.set_xticks(x.tolist())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=4))
    axes.set_ylabel(label)
    axes.set_xlabel(x_label)
    axes.grid(True, axis="y", color=LINE, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    return svg(axes.figure)  # type: ignore[arg-type]
