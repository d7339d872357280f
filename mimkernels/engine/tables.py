"""Tables in the terminal."""

import sys
from collections.abc import Collection, Sequence
from typing import Literal, TextIO

from mimkernels.engine.progress import printable


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

    On a terminal that is too narrow the first column is folded; a file gets every row on a line of its own.

    Args:
        left: columns that are aligned to the left; the others are aligned to the right.
        bold: rows that stand out.
        stream: where to (default: standard output); what it cannot encode is shown escaped.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    stream = stream or sys.stdout
    table = Table(
        title=Text(title, "bold") if title else None, title_justify="left", box=None, pad_edge=False, padding=(0, 1)
    )
    for number, name in enumerate(columns):
        justify: Literal["left", "right"] = "left" if number in left else "right"
        table.add_column(Text(name), justify=justify, header_style="dim", no_wrap=number > 0, overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(*map(Text, row), style="bold" if number in bold else None)
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console.width = 10_000
    with console.capture() as written:
        console.print(table)
    lines = [line.rstrip() for line in written.get().splitlines()] if not console.is_terminal else None
    text = written.get() if lines is None else "".join(f"{line}\n" for line in lines)
    print(printable(text, stream), file=stream, end="", flush=True)
