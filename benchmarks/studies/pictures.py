"""Pictures of the study's page: heads and [cls] by layer, CKA, accuracy by depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.pictures import save
from benchmarks.studies.claims import Result, Study, by_head, by_layer, title
from benchmarks.studies.plan import BUDGETS, METHODS, PATCHES, PLAIN_HEAD, RANDOM, SCRATCH
from mimkernels._palette import CHART, INK, LINE, MUTED, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = dict(zip([*METHODS, SCRATCH], SERIES, strict=True))
COLOURS |= {start: COLOURS[method] for method, start in PLAIN_HEAD.items()} | {RANDOM: MUTED}
DASHES: dict[str, Any] = {SCRATCH: (0, (3, 1.2)), **dict.fromkeys(PLAIN_HEAD.values(), (0, (1, 1)))}
_TOKENS = PATCHES + 1

# Dots of heads: quantity, label, and what values are divided by.
HEADS = (
    ("distance", "attention distance (pixels)", 1.0),
    ("entropy", "entropy / log N", math.log(_TOKENS)),
    ("head_divergence", "head divergence (nats)", 1.0),
)
# Lines of methods: quantity, label, name and height of a reference line.
LINES = (
    ("cls_cls_attention", "attention of [cls] to itself", "uniform", 1 / _TOKENS),
    ("cls_pos_entropy", "entropy of [cls] over patches (nats)", f"uniform: log {PATCHES}", math.log(PATCHES)),
)


# By picture: what it shows.
CAPTIONS = {
    "distance": "Attention distance. A dot is a head of one seed, a thin line a seed, the dark line their mean.",
    "entropy": "Entropy of the heads' attention, as a share of that of uniform attention.",
    "head_divergence": "Head divergence: KL divergence of a head from the others of its layer.",
    "cls_cls_attention": "Attention of [cls] to itself.",
    "cls_pos_entropy": "Entropy of the attention of [cls] over patches, renormalised without [cls].",
    "cka": "CKA between layers on patch tokens, mean over seeds; 0 is the input of the first block.",
    "accuracy_by_depth": "Accuracy of a linear classifier on the mean patch token after every block; 0 is the input of "
    "the first.",
}


def draw_all(study: Study, folder: Path) -> list[str]:
    """Draw every picture for which there are results; the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Figure | None] = {}
    for quantity, label, unit in HEADS:
        drawn[quantity] = head_panels(study, quantity, label, unit)
    for quantity, label, text, height in LINES:
        drawn[quantity] = lines(study, _layers_of(quantity), label, 1, (text, height))
    drawn["accuracy_by_depth"] = lines(study, _depth_probe, "accuracy of a linear classifier (%)", 0)
    drawn["cka"] = cka_maps(study)
    for name, figure in drawn.items():
        if figure is not None:
            save(figure, folder / f"{name}.png", 900)
    return [name for name, figure in drawn.items() if figure is not None]


def _layers_of(quantity: str) -> Callable[[Result], Tensor]:
    return lambda result: by_layer(result, quantity)


def _depth_probe(result: Result) -> Tensor:
    return 100 * torch.tensor(result["analysis"]["accuracy_by_depth"], dtype=torch.float64)


def head_panels(study: Study, quantity: str, label: str, unit: float) -> Figure | None:
    """A row for every budget, a panel for every method, on one scale: a dot per head and seed, thin lines of seeds."""
    runs = {
        (budget, method): [by_head(result, quantity) / unit for result in study.runs(method, budget).values()]
        for budget in BUDGETS
        for method in METHODS
    }
    if not any(runs.values()):
        return None
    axes = grid(len(BUDGETS), len(METHODS), (2.6, 2.5))
    for row, budget in enumerate(BUDGETS):
        for column, method in enumerate(METHODS):
            panel = axes[row][column]
            panel.set_title(title(method), loc="left", fontweight="bold", color=COLOURS[method])
            if not runs[budget, method]:
                _empty(panel)
                continue
            for heads in runs[budget, method]:
                x = torch.arange(1, len(heads) + 1)
                panel.scatter(x[:, None].expand_as(heads).flatten(), heads.flatten(), s=12, color=COLOURS[method],
                              alpha=0.45, linewidths=0, zorder=2)  # fmt: skip
            line(panel, [heads.nanmean(1) for heads in runs[budget, method]], 1, COLOURS[method], INK)
        axes[row][0].set_ylabel(f"{BUDGETS[budget]}\n{label}")
    for panel in axes[-1]:
        panel.set_xlabel("layer")
    return axes[0][0].figure


def lines(
    study: Study, values: Callable[[Result], Tensor], label: str, first: int, reference: tuple[str, float] | None = None
) -> Figure | None:
    """A panel for every budget, in it a line for every method with its seeds as thin lines.

    Args:
        values: ``[layers]`` of a result.
        first: number of the first layer.
        reference: name and height of a dashed line.
    """
    runs = {
        (budget, method): [values(result) for result in study.runs(method, budget).values()]
        for budget in BUDGETS
        for method in METHODS
    }
    if not any(runs.values()):
        return None
    axes = grid(1, len(BUDGETS), (4.6, 3.4))[0]
    for panel, budget in zip(axes, BUDGETS, strict=True):
        panel.set_title(BUDGETS[budget], loc="left", fontweight="bold")
        if reference is not None:
            text, height = reference
            panel.axhline(height, color=MUTED, linewidth=1.2, linestyle=(0, (5, 4)), zorder=1)
            panel.annotate(text, (0.0, height), xycoords=("axes fraction", "data"), xytext=(4, 3),
                           textcoords="offset points", color=MUTED, fontsize=9.5, zorder=4,
                           bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1})  # fmt: skip
        for method in METHODS:
            if runs[budget, method]:
                line(panel, runs[budget, method], first, COLOURS[method], COLOURS[method])
        panel.set_xlabel("layer")
    axes[0].set_ylabel(label)
    legend(axes[0], [method for method in METHODS if any(runs[budget, method] for budget in BUDGETS)])
    return axes[0].figure


def cka_maps(study: Study) -> Figure | None:
    """A row for every budget, a map for every method: CKA between layers, mean over seeds."""
    import matplotlib

    maps = {
        (budget, method): torch.tensor(
            [result["analysis"]["cka"] for result in study.runs(method, budget).values()], dtype=torch.float64
        )
        for budget in BUDGETS
        for method in METHODS
    }
    if not any(len(each) for each in maps.values()):
        return None
    with matplotlib.rc_context(CHART):
        axes = grid(len(BUDGETS), len(METHODS), (2.3, 2.3))
        image = None
        for row, budget in enumerate(BUDGETS):
            for column, method in enumerate(METHODS):
                panel = axes[row][column]
                panel.set_title(title(method), loc="left", fontweight="bold")
                panel.grid(False)
                if not len(maps[budget, method]):
                    _empty(panel)
                    continue
                mean = maps[budget, method].mean(0).numpy()
                image = panel.imshow(mean, origin="lower", cmap="magma", vmin=0, vmax=1, aspect="auto")
            axes[row][0].set_ylabel(f"{BUDGETS[budget]}\nlayer")
        for panel in axes[-1]:
            panel.set_xlabel("layer")
        bar: Any = axes[0][0].figure.colorbar(
            image, ax=[panel for row in axes for panel in row], label="CKA", shrink=0.8
        )
        bar.outline.set_visible(False)
        return axes[0][0].figure


def grid(rows: int, columns: int, size: tuple[float, float], *, one_scale: bool = True) -> Sequence[Sequence[Axes]]:
    """Axes in the style of the project's charts, unless it is told otherwise on one scale."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(CHART):
        figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
        axes: Sequence[Sequence[Axes]] = figure.subplots(rows, columns, sharex=True, sharey=one_scale, squeeze=False)
        for row in axes:
            for panel in row:
                panel.grid(True, axis="y", color=LINE, linewidth=0.6, alpha=0.7)
                panel.set_axisbelow(True)
                panel.tick_params(length=0)
                panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes


def line(panel: Axes, runs: Sequence[Tensor], first: int, thin: str, colour: str) -> None:
    """The mean of runs over layers from number `first` on, and where there are several, each as a thin line."""
    x = torch.arange(first, first + len(runs[0]))
    if len(runs) > 1:
        for run in runs:
            panel.plot(x, run, color=thin, linewidth=0.8, alpha=0.7, zorder=2)
    mean = torch.stack(list(runs)).mean(0)
    panel.plot(x, mean, color=colour, linewidth=1.9, marker="o", markersize=3.2, zorder=3)


def legend(panel: Axes, methods: Sequence[str]) -> None:
    """Name the colours of methods above all panels of the figure."""
    handles = [
        panel.plot([], [], color=COLOURS[m], linewidth=2.4, linestyle=DASHES.get(m, "-"), label=title(m))[0]
        for m in methods
    ]
    columns = 6 if len(handles) <= 6 else 4
    panel.figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK)


def _empty(panel: Axes) -> None:
    panel.annotate("no results yet", (0.5, 0.5), xycoords="axes fraction", ha="center", color=MUTED)
