"""What was read from frozen features: a table in the terminal, and a page with charts, overlays and error maps."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from markupsafe import Markup
from torch import Tensor

from mimkernels._palette import CHART, INK, LINE, SERIES
from mimkernels.commands.dense.config import DenseConfig
from mimkernels.commands.dense.metrics import IGNORED
from mimkernels.commands.dense.results import Pictured, ReadoutResult
from mimkernels.engine import tables
from mimkernels.engine.figures import as_colour, enlarged, named_panel, png_address, svg
from mimkernels.engine.page import write_page

_NEAR, _WRONG_DEPTH = 1.0, 0.5  # metres and relative error: the ends of the colours of depth and of its errors
_MOST_MODELS = 6  # in one chart


class PictureTable(NamedTuple):
    """Rows of pictures, as data addresses, one column per test image."""

    title: str
    text: str
    rows: list[tuple[str, list[str]]]


@dataclass
class DenseReport:
    """What the template shows."""

    config: DenseConfig
    classes: list[str]
    results: list[ReadoutResult]
    pictured: Pictured
    run_facts: dict[str, str]
    versions: dict[str, str]

    @property
    def title(self) -> str:
        return self.config.title or "What is read from frozen patches"

    @property
    def columns(self) -> list[str]:
        return _columns(self.results)

    @property
    def rows(self) -> list[list[str]]:
        return _rows(self.results)

    @property
    def legend(self) -> list[tuple[str, str]]:
        """Classes and their colours."""
        return [(name, _colour(number)) for number, name in enumerate(self.classes)]

    @property
    def class_chart(self) -> Markup | None:
        """Bars of the IoU of every class, of each model's best readout."""
        shown = [result for result in self.best if result.segmentation is not None]
        return class_chart(shown[:_MOST_MODELS], self.classes) if shown else None

    @property
    def layer_charts(self) -> list[Markup]:
        """Scores over the layers that are read by themselves, of models that have several."""
        single = [result for result in self.results if len(result.readout.layers) == 1]
        models = [name for name in dict.fromkeys(result.model for result in single)
                  if sum(result.model == name for result in single) > 1][:_MOST_MODELS]  # fmt: skip
        charts = []
        for name, values in _CURVES.items():
            curves = {
                model: [(r.readout.layers[0], value) for r in single if r.model == model and (value := values(r))]
                for model in models
            }
            curves = {model: sorted(points) for model, points in curves.items() if points}
            if curves:
                charts.append(layer_chart(name, curves))
        return charts

    @property
    def best(self) -> list[ReadoutResult]:
        """Of every model the readout of the best segmentation, or of the best depth."""
        chosen: dict[str, ReadoutResult] = {}
        for result in self.results:
            if result.model not in chosen or _worth(result) > _worth(chosen[result.model]):
                chosen[result.model] = result
        return list(chosen.values())

    @property
    def pictures(self) -> list[PictureTable]:
        """Test images with what is true of them, what was read, and where that is wrong."""
        shown, made = self.pictured, []
        if not len(shown.images):
            return []
        images = [as_colour(image) for image in shown.images]
        addresses = [png_address(enlarged(image)) for image in images]
        by_class = {"segmentation": "linear", "knn": "nearest patches"}
        if any(task in self.config.chosen_tasks for task in by_class):
            rows = [("image", addresses), ("labels", _labelled(images, shown.labels))]
            for result in self.best:
                for task, name in by_class.items():
                    if task in result.predictions:
                        predicted = result.predictions[task]
                        rows.append((f"{result.label}: {name}", _labelled(images, predicted)))
                        rows.append(("wrong pixels", _wrong(images, predicted, shown.labels)))
            made.append(PictureTable("Segmentation", "Classes by colour; wrong pixels in red.", rows))
        if "depth" in self.config.chosen_tasks:
            most = float(shown.depths.max())
            rows = [("image", addresses), ("depth", _mapped(shown.depths, _NEAR, most, "viridis_r"))]
            for result in self.best:
                predicted = result.predictions["depth"]
                error = (predicted - shown.depths).abs() / shown.depths
                rows.append((result.label, _mapped(predicted, _NEAR, most, "viridis_r")))
                rows.append(("relative error", _mapped(error, 0.0, _WRONG_DEPTH, "magma")))
            text = (
                f"Bright is near, from {_NEAR:g} m to {most:.1f} m. Errors from 0, black, to {_WRONG_DEPTH:.0%} of the "
                "depth or more, bright."
            )
            made.append(PictureTable("Depth", text, rows))
        return made

    @property
    def facts(self) -> dict[str, str]:
        return {**self.run_facts, "Versions": ", ".join(f"{name} {number}" for name, number in self.versions.items())}

    @property
    def settings(self) -> str:
        return json.dumps(self.config.to_dict(), indent=2)


_CURVES = {
    "mIoU, %": lambda r: None if r.segmentation is None else 100 * r.segmentation.miou,
    "mIoU of the nearest patches, %": lambda r: None if r.knn is None else 100 * r.knn.miou,
    "RMSE of depth, m": lambda r: None if r.depth is None else r.depth.rmse,
}


def write_report(path: Path, report: DenseReport) -> Path:
    return write_page(path, "commands/dense/templates/report.html", title=report.title, report=report)


def print_results(results: Sequence[ReadoutResult], images: int, stream: TextIO | None = None) -> None:
    """Show the results in the terminal, one line per readout; the best one stands out."""
    best = max(range(len(results)), key=lambda i: _worth(results[i]))
    title = f"Read from frozen patches, {images:,} test images"
    tables.print_table(_columns(results), _rows(results), title=title, left=(0, 1), bold=(best,), stream=stream)


def _worth(result: ReadoutResult) -> float:
    scores = result.segmentation or result.knn
    if scores is not None:
        return scores.miou
    return 0.0 if result.depth is None else -result.depth.rmse


def _columns(results: Sequence[ReadoutResult]) -> list[str]:
    names = ["model", "layer", "maps"]
    if any(result.segmentation for result in results):
        names += ["mIoU", "aAcc", "mAcc"]
    if any(result.knn for result in results):
        names += ["k-NN mIoU"]
    if any(result.depth for result in results):
        names += ["RMSE, m", "abs rel", "d1", "d2", "d3"]
    return names


def _rows(results: Sequence[ReadoutResult]) -> list[list[str]]:
    rows = []
    for result in results:
        height, width = result.grid
        row = [result.model, result.readout.label, f"{result.channels} x {height} x {width}"]
        if result.segmentation:
            row += [f"{100 * value:.1f} %" for value in result.segmentation[:3]]
        if result.knn:
            row += [f"{100 * result.knn.miou:.1f} %"]
        if result.depth:
            row += [f"{result.depth.rmse:.3f}", f"{result.depth.abs_rel:.3f}"]
            row += [f"{100 * value:.1f} %" for value in (result.depth.d1, result.depth.d2, result.depth.d3)]
        rows.append(row)
    return rows


def class_chart(results: Sequence[ReadoutResult], classes: Sequence[str]) -> Markup:
    """Grouped bars, a group per class and a colour per readout, as SVG."""
    import matplotlib

    colours = {result.label: SERIES[i] for i, result in enumerate(results)}
    with matplotlib.rc_context({**CHART, "xtick.color": INK}):
        axes = named_panel((max(6.0, 1.1 * len(classes)), 3.4), colours)
        width = 0.8 / len(results)
        for i, result in enumerate(results):
            assert result.segmentation is not None
            places = [number - 0.4 + (i + 0.5) * width for number in range(len(classes))]
            axes.bar(places, [100 * iou for iou in result.segmentation.iou], width * 0.92, color=colours[result.label])
        axes.set_xticks(range(len(classes)), classes)
        axes.set_ylim(0, 100)
        axes.set_ylabel("IoU, %")
        axes.grid(True, axis="y", color=LINE, linewidth=0.6, alpha=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        return svg(axes.figure)  # type: ignore[arg-type]


def layer_chart(name: str, curves: dict[str, list[tuple[int, float]]]) -> Markup:
    """A score over the layers, a line per model, as SVG."""
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    colours = {model: SERIES[i] for i, model in enumerate(curves)}
    with matplotlib.rc_context(CHART):
        axes = named_panel((4.6, 3.2), colours)
        for model, points in curves.items():
            axes.plot(*zip(*points, strict=True), "o-", color=colours[model], markersize=4, linewidth=1.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel(name)
        axes.grid(True, axis="y", color=LINE, linewidth=0.6, alpha=0.7)
        axes.tick_params(length=0)
        return svg(axes.figure)  # type: ignore[arg-type]


def _colour(number: int) -> str:
    return SERIES[number % len(SERIES)]


def _labelled(images: list[Tensor], labels: Tensor) -> list[str]:
    """Images in grey under the colours of their pixels' classes."""
    import matplotlib

    palette = torch.tensor([matplotlib.colors.to_rgb(_colour(number)) for number in range(256)])
    made = []
    for image, numbers in zip(images, labels.long(), strict=True):
        colours = palette[numbers].permute(2, 0, 1)
        mixed = 0.35 * image.mean(0, keepdim=True) + 0.65 * colours
        made.append(png_address(enlarged(torch.where(numbers == IGNORED, image, mixed))))
    return made


def _wrong(images: list[Tensor], predicted: Tensor, labels: Tensor) -> list[str]:
    red = torch.tensor([0.85, 0.1, 0.1]).view(3, 1, 1)
    made = []
    for image, got, wanted in zip(images, predicted, labels, strict=True):
        wrong = (got != wanted) & (wanted != IGNORED)
        made.append(png_address(enlarged(torch.where(wrong, red, 0.6 * image.mean(0, keepdim=True) + 0.3))))
    return made


def _mapped(values: Tensor, low: float, high: float, name: str) -> list[str]:
    import matplotlib

    colours = matplotlib.colormaps[name]
    made = []
    for each in values:
        scaled = ((each.float() - low) / (high - low)).clamp(0, 1)
        made.append(png_address(enlarged(torch.from_numpy(colours(scaled.numpy())[..., :3]).permute(2, 0, 1).float())))
    return made
