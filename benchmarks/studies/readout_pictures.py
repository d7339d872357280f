"""Pictures of the second stage: accuracy over the share of labels, and dense readouts by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.pictures import save
from benchmarks.studies.claims import FINETUNE, Study, dense_by_layer, fine_tuned
from benchmarks.studies.pictures import COLOURS, DASHES, grid, legend, line
from benchmarks.studies.plan import METRICS, READ, SHARES, STARTS
from mimkernels._palette import INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By picture: what it shows.
CAPTIONS = {
    "finetune": "Accuracy on the test images after fine-tuning. A line is the mean of the seeds, a thin mark a seed.",
    "dense": "Dense readouts of every layer by itself. A thin line is a seed, the thick line their mean. The error of "
    "depth is better where it is smaller.",
}
_COLUMNS = 3


def draw_readouts(study: Study, folder: Path) -> list[str]:
    """Draw the pictures for which there are results; the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"finetune": over_labels(study), "dense": over_layers(study)}
    for name, figure in drawn.items():
        if figure is not None:
            save(figure, folder / f"{name}.png", 900)
    return [name for name, figure in drawn.items() if figure is not None]


def over_labels(study: Study) -> Figure | None:
    """A line of every start over the share of the labels, its seeds as marks beside each other."""
    starts = [start for start in STARTS if study.runs(start, "epochs", FINETUNE)]
    if not starts:
        return None
    panel = grid(1, 1, (7.2, 4.0))[0][0]
    places = torch.arange(len(SHARES), dtype=torch.float64)
    for number, start in enumerate(starts):
        accuracy = torch.tensor(
            [
                [fine_tuned(share.labels)(result) for share in STARTS[start].shares]
                for result in study.runs(start, "epochs", FINETUNE).values()
            ]
        )  # [seeds, shares]
        beside = 0.03 * (number - (len(starts) - 1) / 2)  # so that marks of several starts can be seen
        apart = places[: accuracy.shape[1]] + beside
        dashes = DASHES.get(start, "-")
        panel.plot(apart, accuracy.mean(0), color=COLOURS[start], linewidth=1.9, linestyle=dashes, zorder=3)
        panel.scatter(apart.expand_as(accuracy).flatten(), accuracy.flatten(), marker="_", s=60, linewidths=1.0,
                      color=COLOURS[start], zorder=4)  # fmt: skip
    panel.set_xticks(places, [f"{share.labels}\n{share.images:,} images" for share in SHARES])
    panel.set_xlabel("labels")
    panel.set_ylabel("accuracy (%)")
    legend(panel, starts)
    return panel.figure  # type: ignore[return-value]


def over_layers(study: Study) -> Figure | None:
    """A panel for every metric that there are results of: a line of every method, its seeds as thin lines."""
    runs = {
        task: {
            method: [dense_by_layer(metric)(result) for result in study.runs(method, "epochs", metric.data).values()]
            for method in READ
        }
        for task, metric in METRICS.items()
    }
    shown = [task for task, by_method in runs.items() if any(by_method.values())]
    if not shown:
        return None
    columns = min(_COLUMNS, len(shown))
    axes = grid(-(-len(shown) // columns), columns, (3.4, 3.0), one_scale=False)
    panels = [panel for row in axes for panel in row]
    for task, panel in zip(shown, panels, strict=False):
        panel.set_xlabel("layer")
        panel.tick_params(labelbottom=True)
        panel.set_title(METRICS[task].label, loc="left", fontsize=11, color=INK)
        for method, values in runs[task].items():
            if values:
                line(panel, values, 1, COLOURS[method], COLOURS[method])
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    legend(panels[0], [method for method in READ if any(runs[task][method] for task in shown)])
    return panels[0].figure  # type: ignore[return-value]
