"""``mimkernels bench compare``: two results side by side, and whether the second is slower beyond the noise.

What is compared is the time of ours relative to versions of the same case that contain nothing of ours (plain PyTorch,
SDPA, a copy, ...), timed in the same rounds: so a busy or throttled machine does not look like a regression. A run is
kept as medians of consecutive blocks of rounds; their scatter, and that between runs where there are several, is the
noise. Two processes differ by some per cent with nothing changed, by where memory happened to lie: several runs tell
more than long ones, and a change of less than ``FLOOR`` is never called a regression.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from mimkernels.commands.bench.results import incomplete, read_report
from mimkernels.engine.tables import print_table

FLOOR = 0.04  # relative; of single runs, whose scatter is not known, twice as much
_SIGMAS = 3.0
_STUDENT = {2: 9.9, 4: 4.6, 6: 3.7, 8: 3.4, 10: 3.2}  # 99 % of both sides, by degrees of freedom


class Change(NamedTuple):
    """One case in both runs."""

    name: str
    before_us: float
    after_us: float
    change: float  # of ours relative to the yardsticks: 0.1 is 10 % slower
    noise: float  # a change up to this means nothing

    @property
    def verdict(self) -> str:
        if abs(self.change) <= self.noise:
            return "" if self.noise < 0.1 else "too noisy to tell"
        return "SLOWER" if self.change > 0 else "faster"


def compare(before: dict[str, list[dict]], after: dict[str, list[dict]]) -> list[Change]:
    """Changes of the cases that both have; each maps a case to its records, one per run.

    Raises:
        ValueError: no case is in both.
    """
    common = [name for name in before if name in after]
    if not common:
        raise ValueError(f"no case is in both runs: {_some(before)} before, {_some(after)} after")
    return [_change(name, before[name], after[name]) for name in common]


def _change(name: str, before: list[dict], after: list[dict]) -> Change:
    logs = [[math.log(value) for record in records for value in record["relative"]] for records in (before, after)]
    difference = statistics.median(logs[1]) - statistics.median(logs[0])
    error = _SIGMAS * math.sqrt(sum(_variance_of_median(values) for values in logs))
    noise = max(_between_runs(before, after), math.expm1(error))
    first, second = (statistics.median(r["median_us"]["ours"] for r in records) for records in (before, after))
    return Change(name, first, second, math.expm1(difference), noise)


def _between_runs(*sides: list[dict]) -> float:
    """What runs of the same thing differ by: a change of their median up to this means nothing."""
    if any(len(records) < 2 for records in sides):
        return 2 * FLOOR
    medians = [[math.log(statistics.median(record["relative"])) for record in records] for records in sides]
    freedom = sum(len(values) - 1 for values in medians)
    variance = sum(statistics.variance(values) * (len(values) - 1) for values in medians) / freedom
    error = math.sqrt(variance * sum(1 / len(values) for values in medians))
    student = next((value for least, value in _STUDENT.items() if freedom <= least), 3.0)
    return max(FLOOR, math.expm1(student * error))


def _variance_of_median(values: list[float]) -> float:
    centre = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - centre) for value in values)
    return math.pi / 2 * deviation**2 / len(values)


def _some(records: dict) -> str:
    names = list(records)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"


def read(*places: Path) -> dict[str, list[dict]]:
    """Every comparable record of the JSON files, or of those in the folders, by case; several runs of a case add up.

    Raises:
        ValueError: a place does not exist or holds no results.
    """
    return _records(reports_in(*places), *places)


def _records(reports: dict[str, dict], *places: Path) -> dict[str, list[dict]]:
    records: dict[str, list[dict]] = {}
    for report in reports.values():
        for record in report["results"]:
            if record.get("relative"):
                case = f"{record['name']}, {record['shape']}, {record['dtype']}"
                records.setdefault(case, []).append(record)
    if not records:
        raise ValueError(f"no results to compare in {', '.join(repr(str(place)) for place in places)}")
    return records


def reports_in(*places: Path) -> dict[str, dict]:
    """The reports in the files, or in the folders, by path.

    Raises:
        ValueError: one of the files holds none.
    """
    paths = [path for place in places for path in (sorted(place.glob("*.json")) if place.is_dir() else [place])]
    return {str(path): read_report(path) for path in paths}


def show(changes: list[Change]) -> None:
    rows = [
        [
            change.name,
            f"{change.before_us / 1e3:.3f} ms",
            f"{change.after_us / 1e3:.3f} ms",
            f"{change.change:+.1%}",
            f"{change.noise:.1%}",
            change.verdict,
        ]
        for change in changes
    ]
    slow = [number for number, change in enumerate(changes) if change.verdict == "SLOWER"]
    print_table(["case", "before", "after", "change", "noise", "verdict"], rows, left=(0, 5), bold=slow)
    unclear = sum(change.verdict == "too noisy to tell" for change in changes)
    print(
        f"\n{len(changes)} cases, {len(slow)} slower beyond the noise"
        + (f", {unclear} too noisy to tell a change of 10 %" if unclear else "")
    )


def slower(changes: list[Change]) -> bool:
    """Whether any case is slower beyond the noise."""
    return any(change.verdict == "SLOWER" for change in changes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, help="folder or file of results")
    parser.add_argument("after", type=Path, help="folder or file of results")


def run(options: argparse.Namespace) -> int:
    """Compare and show; 1 if anything is slower beyond the noise, 2 if the two cannot be compared."""
    places = (options.before, options.after)
    try:
        for place in places:
            if not place.exists():
                raise ValueError(f"there is no {str(place)!r}; it takes two folders or files of results")
        sides = [reports_in(place) for place in places]
        changes = compare(*(_records(reports, place) for reports, place in zip(sides, places, strict=True)))
        note = incomplete({path: report for reports in sides for path, report in reports.items()})
    except ValueError as error:
        print(f"mimkernels bench compare: {error}", file=sys.stderr)
        return 2
    show(changes)
    if note:
        print(f"mimkernels bench compare: {note}", file=sys.stderr)
    return int(slower(changes))
