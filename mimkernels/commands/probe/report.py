"""What a probe found: a table in the terminal, and a page with a chart and the pooled attention over pictures."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

from markupsafe import Markup
from torch import Tensor

from mimkernels._palette import ACCENT, CHART, INK, LINE
from mimkernels.commands.probe.config import ProbeConfig
from mimkernels.commands.probe.results import PoolingResult, count_tested
from mimkernels.engine import tables
from mimkernels.engine.figures import as_colour, enlarged, overlay, png_address, svg
from mimkernels.engine.page import write_page
from mimkernels.engine.progress import duration

_QUERIES_SHOWN, _QUERY_IMAGES = 8, 3


@dataclass
class ProbePictures:
    """Images and where poolings look."""

    images: Tensor  # [n, C, S, S] uint8
    classes: list[str]
    weights: dict[str, Tensor]  # [n, G, rows, columns] per pooling


class Row(NamedTuple):
    """A pooling's row in the table of the page."""

    cells: list[str]
    description: str
    is_best: bool


class PictureTable(NamedTuple):
    """Pictures in rows, as data addresses, with names for rows and columns."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]
    label: str = ""  # the pooling whose queries these are
    total: int = 0  # how many queries it has


@dataclass
class ProbeReport:
    """What the templates show of a probe."""

    config: ProbeConfig
    title: str
    run_facts: dict[str, str]
    results: list[PoolingResult]
    pictures: ProbePictures | None
    versions: dict[str, str]

    @property
    def test_images(self) -> int:
        return count_tested(self.results)

    @property
    def chart(self) -> Markup:
        return accuracy_chart(self.results)

    @property
    def columns(self) -> list[str]:
        return _columns(self.results)

    @property
    def rows(self) -> list[Row]:
        best = max((result.accuracy for result in self.results), default=0)
        return [
            Row(cells, result.description, result.accuracy == best)
            for result, cells in zip(self.results, _rows(self.results), strict=True)
        ]

    @property
    def maps(self) -> PictureTable | None:
        """Test images, and below each where every pooling looks."""
        if self.pictures is None:
            return None
        images = [as_colour(image) for image in self.pictures.images]
        rows = [("image", [png_address(enlarged(image)) for image in images])]
        rows += [
            (label, [png_address(overlay(image, weights[i].mean(0))) for i, image in enumerate(images)])
            for label, weights in self.pictures.weights.items()
        ]
        return PictureTable(self.pictures.classes, rows)

    @property
    def queries(self) -> PictureTable | None:
        """Single queries of the pooling that has most of them, on the first images; None if none has several."""
        pictures = self.pictures
        weights = {} if pictures is None else pictures.weights
        several = {label: rows for label, rows in weights.items() if rows.shape[1] > 1}
        if pictures is None or not several:
            return None
        label, most = max(several.items(), key=lambda item: item[1].shape[1])
        shown = range(min(_QUERIES_SHOWN, most.shape[1]))
        chosen = list(zip(pictures.classes, pictures.images, most, strict=True))[:_QUERY_IMAGES]
        rows = [
            (name, [png_address(overlay(as_colour(image), by_query[query])) for query in shown])
            for name, image, by_query in chosen
        ]
        return PictureTable([f"query {query + 1}" for query in shown], rows, label, most.shape[1])

    @property
    def facts(self) -> dict[str, str]:
        versions = (f"{name} {version}" for name, version in self.versions.items())
        return {**self.run_facts, "Versions": ", ".join(versions)}

    @property
    def settings(self) -> str:
        return json.dumps(self.config.to_dict(), indent=2)


def write_report(path: Path, report: ProbeReport) -> Path:
    return write_page(path, "commands/probe/templates/report.html", title=report.title, report=report)


def standard_error(accuracy: float, images: int) -> float:
    """Standard error of an accuracy measured on so many images, from the binomial distribution."""
    return math.sqrt(accuracy * (1 - accuracy) / max(1, images))


def print_results(results: Sequence[PoolingResult], stream: TextIO | None = None) -> None:
    """Show the results in the terminal, one line per pooling; the best one stands out."""
    best = max(range(len(results)), key=lambda i: results[i].accuracy, default=0)
    tables.print_table(
        _columns(results),
        _rows(results),
        title=f"Frozen features, {count_tested(results):,} test images",
        bold=(best,),
        stream=stream,
    )


def _columns(results: Sequence[PoolingResult]) -> list[str]:
    with_knn, with_logistic = _optional(results)
    return ["pooling", "accuracy", *["k-NN"] * with_knn, *["logistic"] * with_logistic, "parameters", "training"]


def _rows(results: Sequence[PoolingResult]) -> list[list[str]]:
    with_knn, with_logistic = _optional(results)
    rows = []
    for result in results:
        error = standard_error(result.accuracy, result.test_images)
        row = [result.label, f"{100 * result.accuracy:.1f} ± {100 * error:.1f} %"]
        row += [_percent(result.knn)] * with_knn + [_percent(result.logistic)] * with_logistic
        row += [f"{result.pooling_parameters:,} + {result.classifier_parameters:,}", _seconds(result.seconds)]
        rows.append(row)
    return rows


def _optional(results: Sequence[PoolingResult]) -> tuple[bool, bool]:
    """Whether any pooling has an accuracy of k-NN, and of logistic regression."""
    return any(result.knn is not None for result in results), any(result.logistic is not None for result in results)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 100 else duration(value)


def accuracy_chart(results: Sequence[PoolingResult]) -> Markup:
    """Horizontal bars with standard errors, as SVG; a circle is the k-NN accuracy."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**CHART, "ytick.color": INK}):
        figure = Figure(figsize=(10, 0.9 + 0.5 * len(results)), layout="constrained")
        axes = figure.subplots()
        best = max((result.accuracy for result in results), default=0)
        for row, result in enumerate(results):
            value = 100 * result.accuracy
            error = 100 * standard_error(result.accuracy, result.test_images)
            axes.barh(row, value, height=0.62, color=ACCENT, alpha=1 if result.accuracy == best else 0.5)
            axes.errorbar(value, row, xerr=error, color=INK, linewidth=1.4, capsize=3)
            axes.text(value + error + 1.2, row, f"{value:.1f} %", va="center", color=INK, fontweight="bold")
            if result.knn is not None:
                axes.plot(100 * result.knn, row, "o", color="white", markeredgecolor=INK, markersize=7)
        axes.set_yticks(range(len(results)), [result.label for result in results])
        axes.invert_yaxis()
        axes.set_xlim(0, 108)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("test accuracy, %")
        axes.grid(True, axis="x", color=LINE, linewidth=0.6, alpha=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        return svg(figure)
