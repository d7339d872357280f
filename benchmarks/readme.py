"""Puts the measured figures into the README: ``python -m benchmarks.readme`` (``--check`` only tells whether they are).

Every folder of ``benchmarks/results/`` with a run gives tables headed by its device's name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mimkernels.commands.bench.results import RESULTS, read_reports
from mimkernels.commands.bench.tables import main_tables

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- figures: python -m benchmarks.readme -->\n", "<!-- end of figures -->\n"


def with_figures(text: str) -> str:
    """The README with the tables of every device between its two marks."""
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"{README.name} lacks the lines {BEGIN.strip()!r} and {END.strip()!r}")
    folders = sorted(path for path in RESULTS.iterdir() if path.is_dir())
    tables = [main_tables(reports) for reports in map(read_reports, folders) if reports]
    return before + BEGIN + "\n" + "\n".join(tables) + "\n" + END + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the README is behind")
    options = parser.parse_args()
    text = README.read_text()
    wanted = with_figures(text)
    if wanted == text:
        return 0
    if options.check:
        print("README.md does not show the committed results; run python -m benchmarks.readme", file=sys.stderr)
        return 1
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
