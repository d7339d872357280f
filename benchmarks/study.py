"""Trains the study of MIM beside supervised and joint-embedding models: ``python -m benchmarks study``.

Each cell, a method with a budget and a seed, is pre-trained, probed and analysed by the library's commands on one
thread, and leaves one JSON in ``benchmarks/results/study/``; a cell that has its JSON is skipped, so that a study that
was stopped goes on with the same command. ``--page`` writes docs/study.md and its pictures from the JSONs there are.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.studies.plan import BUDGETS, METHODS, SEEDS, Cell, cells

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "study"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), metavar="NAME",
                        help=f"methods whose cells run (default: {' '.join(METHODS)})")  # fmt: skip
    parser.add_argument("--budgets", nargs="+", choices=tuple(BUDGETS), default=list(BUDGETS), metavar="NAME",
                        help=f"budgets whose cells run (default: {' '.join(BUDGETS)})")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS), metavar="N",
                        help=f"seeds whose cells run (default: {' '.join(map(str, SEEDS))})")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side, each on one thread (default: 1)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "study", help="folder of the training runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSONs")
    parser.add_argument("--list", action="store_true", help="show the cells and which are done, and end")
    parser.add_argument("--page", action="store_true", help="write the page from the JSONs, and end")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    if options.page:
        from benchmarks.studies.page import write_page

        try:
            print(f"wrote {write_page(options.results, ROOT / 'docs')}")
        except ValueError as error:
            parser.error(str(error))
        return 0
    chosen = [
        cell
        for cell in cells()
        if cell.method in options.methods and cell.budget in options.budgets and cell.seed in options.seeds
    ]
    if options.list:
        for cell in chosen:
            done = "done" if (options.results / f"{cell.name}.json").is_file() else ""
            print(f"{cell.name:22} {cell.epochs:>3} epochs  {done}".rstrip())
        return 0
    return run(chosen, options.work.resolve(), options.results.resolve(), options.jobs)


def run(chosen: list[Cell], work: Path, results: Path, jobs: int) -> int:
    """Run the cells, the next as soon as one is done; the exit status. One that fails leaves the others alone."""
    from benchmarks.studies.cells import CellError, run_cell, write_data

    work.mkdir(parents=True, exist_ok=True)
    (work / "data").mkdir(exist_ok=True)
    write_data(work / "data")

    def run_one(cell: Cell) -> bool:
        began = time.perf_counter()
        try:
            ran = run_cell(cell, work, results)
        except CellError as error:
            print(f"{cell.name}: {error}", file=sys.stderr, flush=True)
            return False
        words = f"done in {(time.perf_counter() - began) / 60:.1f} minutes" if ran else "there already"
        print(f"{cell.name}: {words}", flush=True)
        return True

    with ThreadPoolExecutor(jobs) as pool:
        try:
            done = list(pool.map(run_one, chosen))
        except KeyboardInterrupt:  # the commands that run have received it, too
            pool.shutdown(cancel_futures=True)
            raise
    print(f"{sum(done)} of {len(done)} cells are done")
    return 0 if all(done) else 1
