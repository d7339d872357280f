"""What was read from frozen features: a table in the terminal, and a page with charts, overlays and error maps."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from markupsafe import Markup

from mimkernels.commands.dense.charts import MOST_SERIES, layer_chart
from mimkernels.commands.dense.config import DenseConfig
from mimkernels.commands.dense.data import DenseData
from mimkernels.commands.dense.results import ReadoutResult
from mimkernels.commands.dense.tasks import TASKS
from mimkernels.commands.dense.tasks.base import ChartSection, PictureRow, Task
from mimkernels.engine import tables
from mimkernels.engine.figures import as_colour, enlarged, png_address
from mimkernels.engine.page import render, write_with_numbers
from mimkernels.engine.progress import counted


class PictureTable(NamedTuple):
    """Rows of pictures, as data addresses, one column per test image."""

    title: str
    text: str
    legend: list[tuple[str, str]]
    rows: list[PictureRow]


@dataclass
class DenseReport:
    """What the template shows."""

    config: DenseConfig
    data: DenseData
    results: list[ReadoutResult]
    run_facts: dict[str, str]
    versions: dict[str, str]

    @property
    def title(self) -> str:
        return self.config.title or "What is read from frozen patches"

    @property
    def explanation(self) -> str:
        return " ".join(task.explanation for task in _tasks(self.results))

    @property
    def columns(self) -> list[str]:
        return _columns(self.results)

    @property
    def rows(self) -> list[list[str]]:
        return _rows(self.results)

    @property
    def best_row(self) -> int:
        return _best_row(self.results)

    @property
    def layer_charts(self) -> list[Markup]:
        """Scores over the layers that are read by themselves, of models that have several."""
        single = [result for result in self.results if len(result.readout.layers) == 1]
        models = [name for name in dict.fromkeys(result.model for result in single)
                  if sum(result.model == name for result in single) > 1][:MOST_SERIES]  # fmt: skip
        if not models:
            return []
        return [
            layer_chart(
                name,
                {
                    model: sorted(
                        (r.readout.layers[0], score(r.readings[task.name].scores)) for r in single if r.model == model
                    )
                    for model in models
                },
            )
            for task in _tasks(self.results)
            for name, score in task.curves.items()
        ]

    @property
    def best(self) -> list[ReadoutResult]:
        """Of every model the readout that is best at the first task."""
        chosen: dict[str, ReadoutResult] = {}
        for result in self.results:
            if result.model not in chosen or result.worth > chosen[result.model].worth:
                chosen[result.model] = result
        return list(chosen.values())

    @property
    def sections(self) -> list[ChartSection]:
        """Charts of the best readouts."""
        best = self.best[:MOST_SERIES]
        return [
            section
            for task in _tasks(self.results)
            for section in task.sections(self.data, {r.label: r.readings[task.name].scores for r in best})
        ]

    @property
    def pictures(self) -> list[PictureTable]:
        """Test images with what is true of them, what was read, and where that is wrong."""
        shown = self.data.test.first(self.config.pictures)
        if not len(shown):
            return []
        images = ("image", [png_address(enlarged(as_colour(image))) for image in shown.images])
        by_title: dict[str, list[Task[Any]]] = {}
        for task in _tasks(self.results):
            by_title.setdefault(task.picture_title, []).append(task)
        made = []
        for title, tasks in by_title.items():
            rows = [images, *tasks[0].true_rows(self.data, shown)]
            for result in self.best:
                for task in tasks:
                    rows += task.read_rows(self.data, shown, result.label, result.readings[task.name].predictions)
            text, legend = tasks[0].picture_text(self.data, shown), tasks[0].legend(self.data)
            made.append(PictureTable(title, text, legend, rows))
        return made

    @property
    def facts(self) -> dict[str, str]:
        return {**self.run_facts, "Versions": ", ".join(f"{name} {number}" for name, number in self.versions.items())}

    @property
    def settings(self) -> str:
        return json.dumps(self.config.to_dict(), indent=2)


def write_report(folder: Path, report: DenseReport, numbers: str) -> Path:
    """The page, and the numbers as JSON, into the folder."""
    page = render("commands/dense/templates/report.html", title=report.title, report=report)
    return write_with_numbers(folder, page, numbers, report.config.to_json())


def print_results(results: Sequence[ReadoutResult], images: int, stream: TextIO | None = None) -> None:
    """Show the results in the terminal, one line per readout; the best one stands out."""
    title = f"Read from frozen patches, {counted(images, 'test image')}"
    tables.print_table(
        _columns(results), _rows(results), title=title, left=(0, 1), bold=(_best_row(results),), stream=stream
    )


def _best_row(results: Sequence[ReadoutResult]) -> int:
    return max(range(len(results)), key=lambda i: results[i].worth)


def _tasks(results: Sequence[ReadoutResult]) -> list[Task[Any]]:
    """The tasks that were done, the same for all results."""
    return [TASKS[name] for name in results[0].readings]


def _columns(results: Sequence[ReadoutResult]) -> list[str]:
    return ["model", "layer", "maps", *(name for task in _tasks(results) for name in task.columns)]


def _rows(results: Sequence[ReadoutResult]) -> list[list[str]]:
    rows = []
    for result in results:
        height, width = result.grid
        row = [result.model, result.readout.label, f"{result.channels} x {height} x {width}"]
        rows.append(row + [cell for task in _tasks(results) for cell in task.cells(result.readings[task.name].scores)])
    return rows
