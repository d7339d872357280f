"""What a probe found: a table in the terminal, and a page with a chart and the pooled attention over pictures."""

import datetime
import html
import io
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor

from mimkernels.train.checkpoint import write_text
from mimkernels.train.figures import ACCENT, INK, LINE, MUTED, png_address
from mimkernels.train.probe_config import ProbeConfig
from mimkernels.train.progress import duration
from mimkernels.train.report import page

if TYPE_CHECKING:
    from mimkernels.train.probe_run import PoolingResult

_PICTURE_SIDE = 128
_QUERIES_SHOWN = 8


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
        table.add_column(head, justify="left" if number == 0 else "right", no_wrap=True)
    best = max(range(len(results)), key=lambda i: results[i].accuracy, default=0)
    for number, row in enumerate(rows):
        table.add_row(*row, style="bold" if number == best else None)
    Console(file=stream or sys.stdout).print(table)


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
        "images leave. Parameters: of the pooling + of the linear layer. k-NN uses the pooled vectors without training."
        "</p>"
        f"<figure class=curve>{accuracy_chart(report.results, report.test_images)}</figure>"
        f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _maps(report: ProbeReport) -> str:
    pictures = report.pictures
    if pictures is None:
        return ""
    columns = ["image", *pictures.weights]
    rows = ""
    for number, image in enumerate(pictures.images):
        plain = _colour(image)
        cells = f'<td><img src="{png_address(_enlarged(plain))}" alt="{html.escape(pictures.classes[number])}"></td>'
        for label, weights in pictures.weights.items():
            picture = overlay(plain, weights[number].mean(0))
            cells += f'<td><img src="{png_address(picture)}" alt="weights of {html.escape(label)}"></td>'
        rows += f"<tr><th>{html.escape(pictures.classes[number])}</th>{cells}</tr>"
    head = "<th></th>" + "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    return (
        "<section><h2>Where poolings look</h2><p>Test images under the weights that a pooling gives to their patches: "
        "bright patches count most, and each picture has its own scale. Of a pooling with several queries, the mean."
        f"</p><div class=wide><table class=maps><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        "</section>"
    )


def _queries(report: ProbeReport) -> str:
    """Single queries of the pooling that has most of them."""
    pictures = report.pictures
    several = {} if pictures is None else {k: w for k, w in pictures.weights.items() if w.shape[1] > 1}
    if not several:
        return ""
    label, weights = max(several.items(), key=lambda item: item[1].shape[1])
    shown = list(range(min(_QUERIES_SHOWN, weights.shape[1])))
    rows = ""
    for number in range(min(3, len(pictures.images))):
        plain = _colour(pictures.images[number])
        cells = "".join(
            f'<td><img src="{png_address(overlay(plain, weights[number, query]))}" alt="query {query + 1}"></td>'
            for query in shown
        )
        rows += f"<tr><th>{html.escape(pictures.classes[number])}</th>{cells}</tr>"
    head = "<th></th>" + "".join(f"<th>query {query + 1}</th>" for query in shown)
    return (
        f"<section><h2>The queries of {html.escape(label)}, one by one</h2>"
        f"<p>{len(shown)} of {weights.shape[1]}. Each query fills its own part of the pooled vector.</p>"
        f"<div class=wide><table class=maps><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


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
    """Horizontal bars with standard errors, as SVG; a dot is the k-NN accuracy."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 11,
                "svg.fonttype": "path", "svg.hashsalt": "mimkernels", "axes.edgecolor": LINE, "axes.labelcolor": MUTED,
                "xtick.color": MUTED, "ytick.color": INK, "axes.spines.right": False,
                "axes.spines.top": False}  # fmt: skip
    with matplotlib.rc_context(settings):
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
                first = all(earlier.knn is None for earlier in results[:row])
                axes.plot(100 * result.knn, row, "o", color="white", markeredgecolor=INK, markersize=7,
                          label="k-NN" if first else None)  # fmt: skip
        axes.set_yticks(range(len(results)), [result.label for result in results])
        axes.invert_yaxis()
        axes.set_xlim(0, 108)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("test accuracy, %")
        axes.grid(True, axis="x", color=LINE, linewidth=0.6, alpha=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        if any(result.knn is not None for result in results):
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.02), frameon=False, labelcolor=MUTED, handletextpad=0.2)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
