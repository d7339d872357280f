"""Charts of scores, as SVG."""

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from mimkernels._palette import CHART, INK, LINE, SERIES
from mimkernels.engine.figures import named_panel, svg

MOST_SERIES = 6  # models or readouts in one chart: those whose colours differ

_LEAST_SPAN = 0.1  # of the axis of scores, over the largest: differences far below are not blown up


def bar_chart(
    groups: Sequence[str], bars: Mapping[str, Sequence[float]], unit: str, top: float | None = None
) -> Markup:
    """Grouped bars: a group per name in `groups`, in it a bar of every series of `bars`, a colour each."""
    import matplotlib

    colours = {name: SERIES[i] for i, name in enumerate(bars)}
    with matplotlib.rc_context({**CHART, "xtick.color": INK}):
        axes = named_panel((max(6.0, 1.1 * len(groups)), 3.4), colours)
        width = 0.8 / len(bars)
        for i, (name, values) in enumerate(bars.items()):
            places = [number - 0.4 + (i + 0.5) * width for number in range(len(groups))]
            axes.bar(places, values, width * 0.92, color=colours[name])
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylim(0, top)
        axes.set_ylabel(unit)
        axes.grid(True, axis="y", color=LINE, linewidth=0.6, alpha=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        return svg(axes.figure)  # type: ignore[arg-type]


def layer_chart(name: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> Markup:
    """A score over the layers, a line per model."""
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    colours = {model: SERIES[i] for i, model in enumerate(curves)}
    with matplotlib.rc_context(CHART):
        axes = named_panel((4.6, 3.2), colours)
        for model, points in curves.items():
            axes.plot(*zip(*points, strict=True), "o-", color=colours[model], markersize=4, linewidth=1.8)
        values = [value for points in curves.values() for _, value in points if not math.isnan(value)]
        if values:
            low, high = min(values), max(values)
            least = _LEAST_SPAN * high or 1.0  # an AP of 0 is drawn on a scale of its own
            if high - low < least:
                bottom = max(0.0, (low + high - least) / 2)
                axes.set_ylim(bottom, bottom + least)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel(name)
        axes.grid(True, axis="y", color=LINE, linewidth=0.6, alpha=0.7)
        axes.tick_params(length=0)
        return svg(axes.figure)  # type: ignore[arg-type]
