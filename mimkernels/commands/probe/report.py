"""What a probe found: a table in the terminal, and a page with a chart and the pooled attention over pictures."""

import datetime
import html
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor

from mimkernels.commands.pretrain.report import page
from mimkernels.commands.probe.config import ProbeConfig
from mimkernels.engine.figures import ACCENT, CHART, INK, LINE, png_address, svg
from mimkernels.engine.files import write_text
from mimkernels.engine.progress import duration, printable

if TYPE_CHECKING:
    from mimkernels.commands.probe.run import PoolingResult

_PICTURE_SIDE = 128
_QUERIES_SHOWN, _QUERY_IMAGES = 8, 3


@dataclass
class ProbePictures:
    """Images and where poolings look."""

    images: Tensor  # [n, C, S, S] uint8
    classes: list[str]
    weights: dict[str, Tensor]  # [n, G, rows, columns] per pooling


@dataclass
class ProbeReport:
    """What the page tells."""

    config: ProbeConfig
    title: str
    facts: dict[str, str]
    results: list["PoolingResult"]
    test_images: int
    pictures: ProbePictures | None
    versions: dict[str, str]


def standard_error(accuracy: float, images: int) -> float:
    """Of an accuracy measured on so many images, from the binomial distribution."""
    return math.sqrt(accuracy * (1 - accuracy) / max(1, images))


def print_table(results: list["PoolingResult"], test_images: int, stream: TextIO | None = None) -> None:
    """The results, one line per pooling."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Frozen features, {test_images:,} test images", title_justify="left")
    heads, rows = _table(results, test_images)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    best = max(range(len(results)), key=lambda i: results[i].accuracy, default=0)
    for number, row in enumerate(rows):
        table.add_row(*row, style="bold" if number == best else None)
    stream = stream or sys.stdout
    console = Console(file=stream)
    if not console.is_terminal:
        console.width = 120  # a file has no width to keep to
    with console.capture() as written:
        console.print(table)
    print(printable(written.get(), stream), file=stream, end="", flush=True)


def _table(results: list["PoolingResult"], test_images: int) -> tuple[list[str], list[list[str]]]:
    with_knn = any(result.knn is not None for result in results)
    with_logistic = any(result.logistic is not None for result in results)
    heads = ["pooling", "accuracy"]
    heads += ["k-NN"] * with_knn + ["logistic"] * with_logistic + ["parameters", "training"]
    rows = []
    for result in results:
        error = standard_error(result.accuracy, test_images)
        row = [result.label, f"{100 * result.accuracy:.1f} ± {100 * error:.1f} %"]
        row += [_percent(result.knn)] * with_knn + [_percent(result.logistic)] * with_logistic
        row += [f"{result.pooling_parameters:,} + {result.classifier_parameters:,}", _seconds(result.seconds)]
        rows.append(row)
    return heads, rows


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 100 else duration(value)


def write_probe_report(path: Path, report: ProbeReport) -> Path:
    write_text(path, render(report))
    return path


def render(report: ProbeReport) -> str:
    """The whole page."""
    rows = {**report.facts, "Versions": ", ".join(f"{name} {version}" for name, version in report.versions.items())}
    cells = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in rows.items() if v)
    settings = html.escape(json.dumps(report.config.to_dict(), indent=2))
    facts = (
        f"<section><h2>What was run</h2><dl>{cells}</dl>"
        f"<details><summary>All settings</summary><pre>{settings}</pre></details></section>"
    )
    lead = (
        "The encoder is frozen. Each pooling turns its tokens into one vector, and a linear layer on top tells how "
        "much of the classes that vector holds."
    )
    written = f"Written by mimkernels {report.versions['mimkernels']} on {datetime.date.today():%d %B %Y}."
    return page(report.title, lead, sections(report) + facts, written)


def sections(report: ProbeReport) -> str:
    """Chart, table and pictures, for this page and for the demo's."""
    return "\n".join((_chart(report), _maps(report), _queries(report)))


def _chart(report: ProbeReport) -> str:
    heads, rows = _table(report.results, report.test_images)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in (*heads, "what it does"))
    body = ""
    best = max((result.accuracy for result in report.results), default=0)
    for result, row in zip(report.results, rows, strict=True):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        style = " class=best" if result.accuracy == best else ""
        body += f"<tr{style}>{cells}<td>{html.escape(result.description)}</td></tr>"
    return (
        "<section><h2>What frozen features know</h2>"
        f"<p>Accuracy on {report.test_images:,} test images after the last epoch, with the standard error that so many "
        "images leave. Parameters: of the pooling + of the linear layer. k-NN (the circles) uses "
        "pooled vectors that no label has shaped.</p>"
        f"<figure class=curve>{accuracy_chart(report.results, report.test_images)}</figure>"
        f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _maps(report: ProbeReport) -> str:
    pictures = report.pictures
    if pictures is None:
        return ""
    plain = [_colour(image) for image in pictures.images]
    rows = [("image", [_enlarged(image) for image in plain])]
    rows += [
        (label, [overlay(image, weights[number].mean(0)) for number, image in enumerate(plain)])
        for label, weights in pictures.weights.items()
    ]
    return (
        "<section><h2>Where poolings look</h2><p>Test images under the weights that a pooling gives to their patches: "
        "bright patches count most, and each picture has its own scale. Of a pooling with several queries, the mean."
        f"</p>{_picture_table(pictures.classes, rows)}</section>"
    )


def _queries(report: ProbeReport) -> str:
    """Single queries of the pooling that has most of them."""
    pictures = report.pictures
    several = {} if pictures is None else {k: w for k, w in pictures.weights.items() if w.shape[1] > 1}
    if not several:
        return ""
    label, weights = max(several.items(), key=lambda item: item[1].shape[1])
    shown = range(min(_QUERIES_SHOWN, weights.shape[1]))
    rows = [
        (name, [overlay(_colour(image), of_image[query]) for query in shown])
        for name, image, of_image in list(zip(pictures.classes, pictures.images, weights, strict=True))[:_QUERY_IMAGES]
    ]
    return (
        f"<section><h2>The queries of {html.escape(label)}, one by one</h2>"
        f"<p>{len(shown)} of {weights.shape[1]}. Each query fills its own part of the pooled vector.</p>"
        f"{_picture_table([f'query {query + 1}' for query in shown], rows)}</section>"
    )


def _picture_table(columns: list[str], rows: list[tuple[str, list[Tensor]]]) -> str:
    """Pictures ``[3, S, S]`` in rows, with names for rows and columns."""
    head = "<th></th>" + "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = ""
    for name, pictures in rows:
        cells = "".join(
            f'<td><img src="{png_address(picture)}" alt="{html.escape(f"{name}, {column}")}"></td>'
            for column, picture in zip(columns, pictures, strict=True)
        )
        body += f"<tr><th>{html.escape(name)}</th>{cells}</tr>"
    return f"<div class=wide><table class=maps><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def overlay(image: Tensor, weights: Tensor) -> Tensor:
    """`image` ``[3, S, S]`` in [0, 1] under the colours of `weights` ``[rows, columns]``; enlarged, RGB."""
    import matplotlib

    image = _enlarged(image)
    scaled = weights.float() / weights.max().clamp(min=torch.finfo(torch.float32).tiny)
    scaled = F.interpolate(scaled[None, None], size=image.shape[-2:], mode="nearest")[0, 0]
    colours = torch.from_numpy(matplotlib.colormaps["viridis"](scaled.numpy())[..., :3]).permute(2, 0, 1).float()
    grey = image.mean(0, keepdim=True)
    return 0.45 * grey + 0.55 * colours


def _colour(image: Tensor) -> Tensor:
    """uint8 ``[1 or 3, S, S]`` to ``[3, S, S]`` in [0, 1]."""
    return (image.float() / 255).expand(3, -1, -1)


def _enlarged(image: Tensor) -> Tensor:
    # Whole multiples keep the pixels of small images square and equal.
    times = max(1, -(-_PICTURE_SIDE // image.shape[-1]))
    return image.repeat_interleave(times, 1).repeat_interleave(times, 2)


def accuracy_chart(results: list["PoolingResult"], test_images: int) -> str:
    """Horizontal bars with standard errors, as SVG; a circle is the k-NN accuracy."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**CHART, "ytick.color": INK, "axes.spines.top": False}):
        figure = Figure(figsize=(10, 0.9 + 0.5 * len(results)), layout="constrained")
        axes = figure.subplots()
        best = max((result.accuracy for result in results), default=0)
        for row, result in enumerate(results):
            value = 100 * result.accuracy
            error = 100 * standard_error(result.accuracy, test_images)
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
