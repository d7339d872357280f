"""Tables in the terminal."""

import sys
from collections.abc import Collection, Sequence
from typing import Literal, TextIO

from mimkernels.engine.progress import say

_GAP, _FOLDED = 2, 12  # characters between columns, and of a first column that is folded


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    left: Collection[int] = (0,),
    bold: Collection[int] = (),
    stream: TextIO | None = None,
) -> None:
    """Print rows of text under their columns' names.

    On a terminal that is too narrow the first column is folded; where that does not suffice, the columns come in
    several tables, each with the first ones, by which rows are known. A file gets every row on a line of its own.

    Args:
        left: columns that are aligned to the left; the others are aligned to the right.
        bold: rows that stand out.
        stream: where to (default: standard output); what it cannot encode is shown escaped.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    stream = stream or sys.stdout
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console.width = 10_000
    widths = [max(map(cell_len, cells)) for cells in zip(columns, *rows, strict=True)]
    with console.capture() as written:
        for place, part in enumerate(_parts(widths, console.width, left)):
            heading = Text(title, "bold") if title and not place else None
            if place:
                console.print()
            table = Table(title=heading, title_justify="left", box=None, pad_edge=False, padding=(0, 1))
            for number in part:
                justify: Literal["left", "right"] = "left" if number in left else "right"
                wraps = number == 0 or widths[number] > console.width // 2
                table.add_column(
                    Text(columns[number]), justify=justify, header_style="dim", no_wrap=not wraps, overflow="fold"
                )
            for number, row in enumerate(rows):
                table.add_row(*(Text(row[i]) for i in part), style="bold" if number in bold else None)
            console.print(table)
    lines = [line.rstrip() for line in written.get().splitlines()] if not console.is_terminal else None
    text = written.get() if lines is None else "".join(f"{line}\n" for line in lines)
    say(text, stream, end="")


def _parts(widths: Sequence[int], width: int, left: Collection[int]) -> list[list[int]]:
    """Numbers of the columns of each table, so that all of a table's but for the first fit in `width` unfolded."""
    every = list(range(len(widths)))
    first = min(widths[0], max(_FOLDED, width // 3))
    if first + sum(_GAP + each for each in widths[1:]) <= width:
        return [every]
    keys = [number for number in every if all(other in left for other in every[: number + 1])] or [0]
    room = width - first - sum(_GAP + widths[number] for number in keys[1:])
    parts: list[list[int]] = []
    taken = width
    for number in every[len(keys) :]:
        if taken + _GAP + widths[number] > room:
            parts.append(list(keys))
            taken = 0
        parts[-1].append(number)
        taken += _GAP + widths[number]
    return parts or [every]
