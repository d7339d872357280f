"""``mimkernels bench compare``: two runs side by side, and whether the second is slower beyond the noise.

What is compared is the time of ours relative to versions of the same case that contain nothing of ours (plain PyTorch,
SDPA, a copy, ...), timed in the same rounds: so a busy or throttled machine does not look like a regression. A run is
kept as medians of consecutive blocks of rounds; their scatter, and that between runs where there are several, is the
noise. Two processes differ by some per cent with nothing changed, by where memory happened to lie: so several runs tell
more than long ones, and less than ``FLOOR`` is never called a regression.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from mimkernels.engine.tables import print_table

FLOOR = 0.04  # relative; of single runs, whose scatter is not known, twice as much
_SIGMAS = 3.0
_REPEATS = 5  # runs of each revision, taken in turns
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
    times = (statistics.median(record["median_us"]["ours"] for record in records) for records in (before, after))
    return Change(name, *times, math.expm1(difference), noise)


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
    found: dict[str, list[dict]] = {}
    for place in places:
        paths = sorted(place.glob("*.json")) if place.is_dir() else [place]
        for path in paths:
            try:
                records = json.loads(path.read_text())["results"]
            except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{str(path)!r} holds no results of a run: {error}") from error
            for record in records:
                if record.get("relative"):
                    found.setdefault(f"{record['name']}, {record['shape']}, {record['dtype']}", []).append(record)
    if not found:
        raise ValueError(f"no results to compare in {', '.join(repr(str(place)) for place in places)}")
    return found


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", help="folder or file of results, or a git revision")
    parser.add_argument("after", help="folder or file of results, or a git revision")
    parser.add_argument("--repeat", type=int, default=_REPEATS, help=f"runs of each revision (default {_REPEATS})")
    parser.add_argument("--seconds", type=float, default=2.0, help="of revisions: measuring time per case (default 2)")
    parser.add_argument("--only", help="of revisions: cases whose name contains this")
    parser.add_argument("--group", nargs="+", default=["gathering", "pooling", "mlp", "attention"], help="of revisions")


def run(options: argparse.Namespace) -> int:
    """Compare and show; 1 if anything is slower beyond the noise, 2 if the two cannot be compared."""
    places = [Path(options.before), Path(options.after)]
    try:
        missing = [place for place in places if not place.exists()]
        if len(missing) == 1:
            raise ValueError(f"there is no {str(missing[0])!r}; it takes two folders or files, or two git revisions")
        if not missing:
            changes = compare(*(read(place) for place in places))
        else:
            changes = _compare_revisions(options)
    except (ValueError, subprocess.CalledProcessError) as error:
        print(f"mimkernels bench compare: {error}\n{getattr(error, 'stderr', None) or ''}".rstrip(), file=sys.stderr)
        return 2
    show(changes)
    return int(any(change.verdict == "SLOWER" for change in changes))


def _compare_revisions(options: argparse.Namespace) -> list[Change]:
    revisions = [_commit(options.before), _commit(options.after)]
    root = Path(_git("rev-parse", "--show-toplevel"))
    with tempfile.TemporaryDirectory() as folder:
        trees = [Path(folder) / name for name in ("before", "after")]
        try:
            for tree, revision in zip(trees, revisions, strict=True):
                _git("worktree", "add", "--detach", str(tree), revision)
                _build(tree, root)
            results: list[list[Path]] = [[], []]
            for number in range(options.repeat):
                for side, tree in enumerate(trees):
                    print(f"run {number + 1} of {options.repeat}, {('before', 'after')[side]}", flush=True)
                    results[side].append(_bench(tree, Path(folder) / f"{side}-{number}", options))
            return compare(*(read(*side) for side in results))
        finally:
            for tree in trees:
                subprocess.run(["git", "worktree", "remove", "--force", str(tree)], capture_output=True)


def _build(tree: Path, root: Path) -> None:
    """The tree's libraries: those that are here if its sources are the same, else compiled."""
    native = ("csrc", "CMakeLists.txt", "setup.py")
    here = root / "mimkernels" / "_lib"
    same = not subprocess.run(["git", "diff", "--quiet", _git("rev-parse", "HEAD", cwd=tree), "--", *native], cwd=root)\
        .returncode  # fmt: skip
    if same and any(here.glob("*.so")):
        shutil.copytree(here, tree / "mimkernels" / "_lib", dirs_exist_ok=True)
        return
    print(f"compiling {tree.name}", flush=True)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_native", "--inplace"],
        cwd=tree, env={**os.environ, "MIMKERNELS_BUILD": "require"}, check=True, capture_output=True, text=True,
    )  # fmt: skip


def _bench(tree: Path, output: Path, options: argparse.Namespace) -> Path:
    command = [sys.executable, "-m", "mimkernels", "bench", "run", "--no-compile", "--output", str(output)]
    command += ["--seconds", str(options.seconds), "--group", *options.group]
    command += ["--only", options.only] if options.only else []
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True, text=True)
    return output


def _commit(revision: str) -> str:
    try:
        return _git("rev-parse", "--verify", f"{revision}^{{commit}}")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise ValueError(f"{revision!r} is neither a folder or file of results nor a git revision") from error


def _git(*arguments: str, cwd: Path | None = None) -> str:
    return subprocess.run(["git", *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()
