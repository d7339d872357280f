"""The figures of a run as Markdown tables, headed by the device they were measured on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from mimkernels.commands.bench.results import incomplete

MEMORY, ATTENTION, STEP, MODELS, CALLS = (
    ("gathering", "pooling", "mlp", "segmentation", "norm"),
    ("attention",),
    ("step",),
    ("models", "windows"),
    ("calls",),
)


def all_tables(reports: dict[str, dict]) -> str:
    """Ops, attention, the whole step, models under ``accelerate``, and the cost of a call; reports by group and dtype
    ("gathering-float32")."""
    tables = (part(reports) for part in (_heading, _memory, _attention, _step, _models, _calls))
    return "\n\n".join(filter(None, tables)) + "\n"


def records_of(reports: dict[str, dict], groups: Iterable[str]) -> list[dict]:
    groups = tuple(groups)
    return [record for name, report in reports.items() if name.split("-")[0] in groups for record in report["results"]]


def _heading(reports: dict[str, dict]) -> str:
    about = next(iter(reports.values()))["machine"]
    threads = f", {about['threads']} threads ({about['cpu_isa']})" if about.get("threads") else ""
    note = incomplete(reports)
    return (
        f"**{about['device']}{threads}**, torch {about['torch']}; medians, all versions of a case in one process"
        f"{'; ' if note else ''}{note}:"
    )


def _memory(reports: dict[str, dict]) -> str:
    records = [r for r in records_of(reports, MEMORY) if r["dtype"] in ("float32", "bfloat16")]
    if not records:
        return ""
    libraries = [name for name in ("lightly", "timm") if any(name in r["median_us"] for r in records)]
    columns = ["against plain PyTorch", "`torch.compile` of it", *libraries, "share of copy", "peak memory, of plain's"]
    rows = []
    for r in records:
        peak = r.get("peak_bytes", {})
        rows.append(
            [
                _label(r, records),
                *(_times(r, name) for name in ("plain", "compiled", *libraries)),
                _share(r["share_of_copy_bandwidth"]),
                _share(peak["ours"] / peak["plain"]) if peak.get("plain") else "",
            ]
        )
    unless = ", ".join(filter(None, (usual(records, key) for key in ("dtype", "shape"))))
    return _table([f"times as fast ({unless})" if unless else "times as fast", *columns], rows)


def _attention(reports: dict[str, dict]) -> str:
    records = records_of(reports, ATTENTION)
    columns = ["time of SDPA's", "entropy only", "no statistics", "against materialised", "share of GEMM rate"]
    rows = []
    for r in records:
        shares = {name: f"{us / r['median_us']['sdpa']:.2f}" for name, us in r["median_us"].items()}
        against = f"{_times(r, 'plain')} times faster" if "plain" in r["median_us"] else ""
        label = _label(r, []).removeprefix("attention, ").replace("packed attention", "packed, without statistics")
        ours = [shares.get(name, "") for name in ("ours", "entropy", "bare")]
        rows.append([label, *ours, against, _share(r["share_of_gemm_rate"])])
    return _table(["attention with all statistics", *columns], rows)


def _step(reports: dict[str, dict]) -> str:
    return _whole(records_of(reports, STEP), "a training step, images per second", "published code")


def _models(reports: dict[str, dict]) -> str:
    return _whole(records_of(reports, MODELS), "under `mimkernels.accelerate`, images per second", "stock")


def _whole(records: list[dict], title: str, other: str) -> str:
    compiled = any("compiled" in r["median_us"] for r in records)
    columns = ["mimkernels", other, "times as fast"] + (["both under `torch.compile`"] if compiled else [])
    columns.append("outside of matrix products, s")
    rows = []
    for r in records:
        rates = {name: r["images"] / us * 1e6 for name, us in r["median_us"].items()}
        row = [_label(r, []), f"{rates['ours']:.2f}", f"{rates['plain']:.2f}", f"{rates['ours'] / rates['plain']:.2f}"]
        if compiled:
            row.append(f"{rates['ours, compiled']:.2f}, {rates['compiled']:.2f}" if "compiled" in rates else "")
        spent = r.get("breakdown_ms", {})
        outside = [sum(ms for kind, ms in spent[name].items() if kind != "GEMM") / 1e3 for name in spent]
        row.append(", ".join(f"{seconds:.2f}" for seconds in outside[:2]))
        rows.append(row)
    return _table([title, *columns], rows)


def _calls(reports: dict[str, dict]) -> str:
    records = records_of(reports, CALLS)
    versions = list(dict.fromkeys(name for r in records for name in r["median_us"]))
    rows = [
        [
            r["name"].removeprefix("call of "),
            *(f"{r['median_us'][v] / r['calls']:.1f}" if v in r["median_us"] else "" for v in versions),
        ]
        for r in records
    ]
    return _table(["microseconds of a call on tiny inputs", *versions], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def usual(records: list[dict], key: str) -> str | None:
    """The most frequent value of the records, if more than a third of them have it."""
    if not records:
        return None
    value, times = Counter(record[key] for record in records).most_common(1)[0]
    return value if times > len(records) / 3 else None


def _label(record: dict, records: list[dict]) -> str:
    """The case, with its shape and dtype where these are not the usual ones of `records`."""
    unusual = [record[key] for key in ("shape", "dtype") if record[key] != usual(records, key)]
    return ", ".join([record["name"], *unusual])


def _times(record: dict, version: str) -> str:
    return f"{record['median_us'][version] / record['median_us']['ours']:.1f}" if version in record["median_us"] else ""


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
