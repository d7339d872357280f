"""Trains the study of MIM beside supervised and joint-embedding models: ``python -m benchmarks study``.

Each cell, a method with a budget and a seed, is pre-trained, probed and analysed by the library's commands on one
thread, and leaves one JSON in ``benchmarks/results/study/``; a cell that has its JSON is skipped, so that a study that
was stopped goes on with the same command. ``--readouts`` runs the second stage in the same way: models of equal epochs,
trained first where their run is not in ``--work``, are fine-tuned with few labels, and their patches are read.
``--page`` writes docs/study.md and its pictures from the JSONs there are.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from benchmarks.studies.plan import BUDGETS, METHODS, SEEDS, Cell, Piece, cells, pieces

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "study"

Part = TypeVar("Part", Cell, Piece)


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
    parser.add_argument("--readouts", action="store_true",
                        help="run the second stage: pieces whose models are all chosen")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="show the cells, or pieces, and which are done, and end")
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
    if options.readouts:
        read = [
            piece
            for piece in pieces()
            if piece.seed in options.seeds and all(cell.method in options.methods for cell in piece.cells)
        ]
        if options.list:
            for piece in read:
                print(f"{piece.name:26} {_done(piece, options.results)}".rstrip())
            return 0
        return run_readouts(read, options.work.resolve(), options.results.resolve(), options.jobs)
    chosen = [
        cell
        for cell in cells()
        if cell.method in options.methods and cell.budget in options.budgets and cell.seed in options.seeds
    ]
    if options.list:
        for cell in chosen:
            print(f"{cell.name:22} {cell.epochs:>3} epochs  {_done(cell, options.results)}".rstrip())
        return 0
    return run(chosen, options.work.resolve(), options.results.resolve(), options.jobs)


def _done(part: Cell | Piece, results: Path) -> str:
    return "done" if (results / f"{part.name}.json").is_file() else ""


def run(chosen: Sequence[Cell], work: Path, results: Path, jobs: int) -> int:
    """Run the cells; the exit status. One that fails leaves the others alone."""
    from benchmarks.studies.cells import run_cell

    _prepare(work)
    done = _side_by_side(chosen, lambda cell: run_cell(cell, work, results), jobs)
    print(f"{sum(done)} of {len(done)} cells are done")
    return 0 if all(done) else 1


def run_readouts(chosen: Sequence[Piece], work: Path, results: Path, jobs: int) -> int:
    """Run pieces of the second stage, seed by seed, each after the models that it takes; the exit status."""
    from benchmarks.studies.readouts import as_recorded, ensure_run, run_piece

    def trained(cell: Cell) -> bool:
        anew = ensure_run(cell, work)
        if as_recorded(cell, work, results) is False:
            print(f"{cell.name}: its last losses are not those of {results / cell.name}.json", file=sys.stderr)
        return anew

    _prepare(work)
    done: list[bool] = []
    for _, group in groupby(chosen, lambda piece: piece.seed):
        of_seed = list(group)
        models = dict.fromkeys(cell for piece in of_seed if not _done(piece, results) for cell in piece.cells)
        _side_by_side(sorted(models, key=lambda cell: cell.flops, reverse=True), trained, jobs)  # the longest first
        done += _side_by_side(of_seed, lambda piece: run_piece(piece, work, results), jobs)
    print(f"{sum(done)} of {len(done)} pieces are done")
    return 0 if all(done) else 1


def _prepare(work: Path) -> None:
    from benchmarks.studies import cells

    (work / "data").mkdir(parents=True, exist_ok=True)
    cells.write_data(work / "data")


def _side_by_side(parts: Sequence[Part], run_one: Callable[[Part], bool], jobs: int) -> list[bool]:
    """Run parts, the next as soon as one is done; which did not fail.

    Args:
        run_one: whether there was anything to do.
    """
    from benchmarks.studies.cells import CellError

    def told(part: Part) -> bool:
        began = time.perf_counter()
        try:
            ran = run_one(part)
        except CellError as error:
            print(f"{part.name}: {error}", file=sys.stderr, flush=True)
            return False
        words = f"done in {(time.perf_counter() - began) / 60:.1f} minutes" if ran else "there already"
        print(f"{part.name}: {words}", flush=True)
        return True

    with ThreadPoolExecutor(jobs) as pool:
        try:
            return list(pool.map(told, parts))
        except KeyboardInterrupt:  # the commands that run have received it, too
            pool.shutdown(cancel_futures=True)
            raise
