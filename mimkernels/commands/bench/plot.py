"""``mimkernels bench plot``: a run as pictures (speed-ups, roofline, scaling curves), tables, and one page of them."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimkernels._palette import ACCENT, CHART, INK, LINE, MUTED
from mimkernels.commands.bench.results import RESULTS, incomplete, output_folder, read_reports
from mimkernels.commands.bench.tables import ATTENTION, MEMORY, MODELS, STEP, all_tables, records_of, usual

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS, _OTHERS = ACCENT, {"plain": "#c9d1da", "compiled": "#8e9aa8", "sdpa": MUTED}
_LABELS = {
    "plain": "plain PyTorch",
    "compiled": "torch.compile",
    "sdpa": "SDPA without statistics",
    "ours": "mimkernels",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, nargs="?", help="folder of JSON (default: the newest under "
                        "benchmarks/results)")  # fmt: skip
    parser.add_argument("--output", type=output_folder, metavar="DIR",
                        help="folder of the pictures and the page (default: that of the JSON)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Draw what there is; the exit status."""
    folder = options.results or _newest(RESULTS)
    try:
        reports = read_reports(folder) if folder else {}
    except ValueError as error:
        print(f"mimkernels bench plot: {error}", file=sys.stderr)
        return 2
    if not reports or folder is None:
        print(f"mimkernels bench plot: no results in {str(folder or RESULTS)!r}; `mimkernels bench run` makes some",
              file=sys.stderr)  # fmt: skip
        return 2
    if note := incomplete(reports):
        print(f"mimkernels bench plot: {note}", file=sys.stderr)
    output = options.output or folder
    output.mkdir(parents=True, exist_ok=True)
    for path in draw(reports, output):
        print(path)
    return 0


def measured(reports: dict[str, dict]) -> str:
    """Digest of the times that ``speedups.png`` shows, and carries as a comment: of older ones it is another."""
    times = [
        [name, record["name"], record["shape"], record["median_us"]]
        for name, report in sorted(reports.items())
        if name.split("-")[0] in MEMORY + MODELS
        for record in report["results"]
    ]
    return hashlib.sha256(json.dumps(times, sort_keys=True).encode()).hexdigest()


def draw(reports: dict[str, dict], output: Path) -> list[Path]:
    """Write the pictures of reports, named by group and dtype ("gathering-float32"), and the page that holds them."""
    import matplotlib

    pictures: dict[str, tuple[str, Figure]] = {}
    with matplotlib.rc_context({**CHART, "font.size": 10, "axes.titlesize": 11}):
        memory = records_of(reports, MEMORY)
        attention = records_of(reports, ATTENTION)
        whole = records_of(reports, MODELS)
        if memory or whole:
            note = "Times as fast as each alternative, in the same process, interleaved; longer is better."
            pictures["speedups"] = (note, _bars(memory + whole, ("plain", "compiled"), _LABELS))
        if attention:
            note = (
                "With all statistics (packed: with none), against SDPA, which captures none, and against materialised "
                "attention."
            )
            pictures["attention"] = (
                note,
                _bars(attention, ("sdpa", "plain"), {**_LABELS, "plain": "materialised attention"}),
            )
        if memory or attention:
            pictures["limits"] = ("How near the machine's own limit each case comes.", _limits(memory + attention))
        products = [record for record in memory + attention if record.get("flops")]
        if products:
            note = "Cases with products: arithmetic per byte moved, and the rate reached. The roofs were measured, too."
            pictures["roofline"] = (note, _roofline(products))
        scaling = records_of(reports, ("scaling",))
        if scaling:
            note = "How time and memory grow. Flat is linear."
            pictures["scaling"] = (note, _scaling(scaling))
        steps = [record for record in records_of(reports, STEP) if "breakdown_ms" in record]
        if steps:
            pictures["step"] = ("Where the time of a training step goes.", _steps(steps))
        written = []
        for name, (_, figure) in pictures.items():
            written.append(output / f"{name}.png")
            figure.savefig(
                written[-1], dpi=110, metadata={"Comment": measured(reports)} if name == "speedups" else None
            )
    written.append(output / "tables.md")
    written[-1].write_text(all_tables(reports))
    return [*written, _page(reports, {name: note for name, (note, _) in pictures.items()}, output)]


def _bars(records: list[dict], others: tuple[str, ...], labels: dict[str, str]) -> Figure:
    from matplotlib.figure import Figure

    others = tuple(name for name in others if any(name in r["median_us"] for r in records))
    figure = Figure(figsize=(10, 1.2 + 0.17 * len(records) * (len(others) + 0.4)), layout="constrained")
    axes = figure.subplots()
    height, step = 0.8 / len(others), 1.0
    most = max(r["median_us"][o] / r["median_us"]["ours"] for r in records for o in others if o in r["median_us"])
    for row, record in enumerate(records):
        for number, other in enumerate(others):
            if other not in record["median_us"]:
                continue
            ratio = record["median_us"][other] / record["median_us"]["ours"]
            y = row * step + (number - (len(others) - 1) / 2) * height
            axes.barh(y, ratio, height * 0.92, color=_OURS if number == 0 else _OTHERS["compiled"])
            axes.text(
                ratio + 0.008 * most, y, f"{ratio:.1f}" if ratio >= 2 else f"{ratio:.2f}", va="center", fontsize=9
            )
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(records)), [_row_label(r, records) for r in records], color=INK)
    axes.set_ylim(len(records) - 0.4, -0.6)
    axes.set_xlim(0, most * 1.1)
    _label_x(axes, "times as fast as the alternative", records)
    axes.tick_params(length=0)
    colours = (_OURS, _OTHERS["compiled"])[: len(others)]
    _legend(axes, colours, ["against " + labels[other] for other in others])
    return figure


def _row_label(record: dict, records: list[dict]) -> str:
    """A record's name, and what tells it from most others."""
    unusual = "  ".join(record[key] for key in ("shape", "dtype") if record[key] != usual(records, key))
    between = "\n" if len(record["name"] + unusual) > 60 else "  "  # where one line would take the bars' room
    return between.join(filter(None, (record["name"], unusual)))


def _label_x(axes: Axes, label: str, records: list[dict]) -> None:
    common = [usual(records, "shape"), usual(records, "dtype")]
    axes.set_xlabel("; ".join(filter(None, [label, ", ".join(filter(None, common))])), loc="right")


def _limits(records: list[dict]) -> Figure:
    """How much of the machine's limit each case reaches."""
    from matplotlib.figure import Figure

    drawn = [(record, share) for record in records if (share := _share(record))]
    figure = Figure(figsize=(10, 1.1 + 0.27 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    for row, (_, (reached, limit)) in enumerate(drawn):
        axes.barh(row, reached, 0.72, color=_OURS if limit == "copy" else _OTHERS["sdpa"])
        axes.text(reached + 0.008, row, f"{reached:.0%}", va="center", fontsize=8)
    axes.set_yticks(range(len(drawn)), [_row_label(r, [r for r, _ in drawn]) for r, _ in drawn], color=INK)
    axes.set_ylim(len(drawn) - 0.4, -0.6)
    axes.set_xlim(0, 1.1 * max(1.0, *(reached for _, (reached, _) in drawn)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _label_x(axes, "share of the limit", [record for record, _ in drawn])
    axes.tick_params(length=0)
    _legend(axes, (_OURS, _OTHERS["sdpa"]), ("of copy bandwidth", "of the rate of a large matrix product"))
    return figure


def _share(record: dict) -> tuple[float, str] | None:
    copy: Any = record.get("share_of_copy_bandwidth")
    gemm: Any = record.get("share_of_gemm_rate")
    if copy is None and gemm is None:
        return None
    return (copy, "copy") if copy is not None else (gemm, "gemm")


def _roofline(records: list[dict]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.2), layout="constrained")
    axes, key = figure.subplots(1, 2, width_ratios=(3, 1.5))
    copies = [r["moved_bytes"] / r["median_us"]["copy"] for r in records if "copy" in r["median_us"]]
    bandwidth = statistics.median(copies) / 1e3 if copies else 0.0  # GB/s
    peak = statistics.median(r["flops"] / r["median_us"]["ours"] / r["share_of_gemm_rate"] for r in records) / 1e3
    points = [(r["flops"] / _bytes(r), r["flops"] / r["median_us"]["ours"] / 1e3) for r in records]
    low, high = 0.5 * min(x for x, _ in points), 3 * max(x for x, _ in points)
    if bandwidth:
        knee = peak / bandwidth
        axes.plot([low, knee, max(high, 2 * knee)], [low * bandwidth, peak, peak], color=INK, linewidth=1.4)
        axes.text(0.35 * knee, 0.45 * peak, f"copy, {bandwidth:.3g} GB/s", color=INK, ha="right")
    else:
        axes.axhline(peak, color=INK, linewidth=1.4)
    axes.text(high, peak * 1.08, f"large matrix product, {peak:,.0f} GFLOP/s", ha="right", color=INK)
    for number, (intensity, rate) in enumerate(points, 1):
        axes.scatter(intensity, rate, s=36, color=_OURS, zorder=3)
        axes.annotate(str(number), (intensity, rate), xytext=(5, -10), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="floating-point operations per byte moved", ylabel="GFLOP/s")
    axes.grid(True, which="major", color=LINE, linewidth=0.6)
    axes.tick_params(which="both", length=0)
    key.axis("off")
    labels = [f"{number}  {_row_label(record, records)}" for number, record in enumerate(records, 1)]
    key.text(0, 1, "\n".join(labels), fontsize=8, va="top", color=INK, linespacing=1.6)
    return figure


def _bytes(record: dict) -> float:
    """What a case with products moves at least; of attention: q, k, v, the output, and their gradients."""
    if record["moved_bytes"]:
        return record["moved_bytes"]
    sizes = _sizes(record["shape"])
    tensors = 8 if "backward" in record["name"] else 4
    return tensors * sizes["B"] * sizes["H"] * sizes["N"] * sizes["D"] * (4 if record["dtype"] == "float32" else 2)


def _legend(axes: Axes, colours: Iterable[str], labels: Iterable[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=label) for colour, label in zip(colours, labels, strict=True)]
    axes.legend(handles=handles, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(handles))


def _scaling(records: list[dict]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9), layout="constrained")
    by_batch, by_ratio, by_time, by_memory = figure.subplots(2, 2).flat
    _curves(by_batch, records, "by batch", "B", lambda r, s: r["median_us"]["ours"] * 1e3 / (r["images"] * s["N"]))
    by_batch.set(title="time per token", xlabel="images per batch", ylabel="ns per token", xscale="log", yscale="log")
    _curves(by_ratio, records, "by mask ratio", "K", lambda r, s: r["median_us"]["ours"] / 1e3)
    by_ratio.set(title="time against the kept tokens", xlabel="kept of 196 tokens", ylabel="ms")
    lengths = [r for r in records if r["name"].endswith("by tokens")]
    for version in ("ours", "sdpa", "plain"):
        drawn = [r for r in lengths if version in r["median_us"]]
        if not drawn:
            continue
        colour = _OURS if version == "ours" else _OTHERS[version]
        tokens = [_sizes(r["shape"])["N"] for r in drawn]
        heads = [_sizes(r["shape"])["H"] for r in drawn]
        label = "materialised" if version == "plain" else _LABELS[version]
        by_time.plot(tokens, [r["median_us"][version] / 1e3 / h for r, h in zip(drawn, heads, strict=True)], "o-",
                     color=colour, label=label)  # fmt: skip
        memory = [r["peak_bytes"][version] / 2**20 / h for r, h in zip(drawn, heads, strict=True)]
        by_memory.plot(tokens, memory, "o-", color=colour, label=label)
    by_time.set(
        title="attention, forward + backward", xlabel="tokens", ylabel="ms per head", xscale="log", yscale="log"
    )
    by_memory.set(title="attention, peak memory", xlabel="tokens", ylabel="MiB per head", xscale="log", yscale="log")
    for axes in (by_batch, by_ratio, by_time, by_memory):
        axes.grid(True, color=LINE, linewidth=0.6)
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        axes.tick_params(length=0)
    return figure


def _curves(axes: Axes, records: list[dict], along: str, size: str, value) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if record["name"].endswith(along):
            sizes = _sizes(record["shape"])
            name = record["name"].removesuffix(f", {along}")
            lines.setdefault(name, []).append((sizes[size], value(record, sizes)))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, label=name)


def _steps(records: list[dict]) -> Figure:
    from matplotlib.figure import Figure

    colours = (INK, _OURS, "#6aa5de", "#9bb4a0", "#c9a66b", "#c9d1da")
    rows = [
        (record, name, label) for record in records for name, label in (("plain", "published"), ("ours", "mimkernels"))
    ]
    figure = Figure(figsize=(10, 1.6 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    kinds = list(records[0]["breakdown_ms"]["ours"])
    for row, (record, name, _) in enumerate(rows):
        # The profiler slows things down: its shares, of the time that was measured without it.
        parts, left = record["breakdown_ms"][name], 0.0
        whole = record["median_us"][name] / 1e3
        for kind, colour in zip(kinds, colours, strict=True):
            width = parts[kind] / sum(parts.values()) * whole
            axes.barh(row, width, 0.62, left=left, color=colour, label=kind if row == 0 else None)
            left += width
        axes.text(left, row, f"  {record['images'] / whole * 1e3:.2f} images/s", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{r['name']}\n{r['shape']}, {label}" for r, _, label in rows], color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(record["median_us"][name] / 1e3 for record, name, _ in rows))
    axes.set_xlabel("ms per step")
    axes.tick_params(length=0)
    axes.legend(
        frameon=False, ncols=len(kinds), fontsize=9, loc="lower right", bbox_to_anchor=(1.0, 1.0), handlelength=1
    )
    return figure


def _page(reports: dict[str, dict], notes: dict[str, str], output: Path) -> Path:
    from mimkernels.engine.figures import data_address
    from mimkernels.engine.page import write_page

    about = next(iter(reports.values()))["machine"]
    threads = f", {about['threads']} threads, {about['cpu_isa']}" if about.get("threads") else ""
    measured = f"measured with mimkernels {about['mimkernels']}, torch {about['torch']}"
    medians = "medians, all versions in one process"
    return write_page(
        output / "report.html",
        "commands/bench/templates/report.html",
        title="What the kernels save",
        lead="; ".join(filter(None, [about["device"] + threads, measured, incomplete(reports), medians])) + ".",
        pictures=[
            {"name": name, "note": note, "address": data_address((output / f"{name}.png").read_bytes())}
            for name, note in notes.items()
        ],
    )


def _sizes(shape: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", shape)}


def _newest(root: Path) -> Path | None:
    folders = [path for path in root.glob("*") if path.is_dir() and any(path.glob("*.json"))]
    return max(folders, key=lambda path: max(p.stat().st_mtime for p in path.glob("*.json")), default=None)
