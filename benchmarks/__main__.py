"""``python -m benchmarks``: the tools that need this checkout, one subcommand for each module of this folder.

A tool's ``main`` reads ``sys.argv`` and returns the exit status, or None; the first line of its docstring is its help.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path


def tools() -> dict[str, tuple[str, str]]:
    """By subcommand: the module, which is imported only when it runs, and a line of help."""
    modules = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("__"))
    return {path.stem.replace("_", "-"): (path.stem, _help(path)) for path in modules}


def _help(path: Path) -> str:
    first, *_ = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines() or [""]
    return first.partition(": ``")[0].rstrip(".").replace("``", "")


def main(arguments: Sequence[str]) -> int:
    """Run the tool that the first argument names with the other arguments; the exit status."""
    available = tools()
    width = max(map(len, available))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        usage="%(prog)s [-h] tool ...",
        description="The tools that need a checkout. The benchmarks themselves are run by `mimkernels bench`.",
        epilog="tools:\n" + "\n".join(f"  {name:{width}}  {words}" for name, (_, words) in available.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "tool", choices=available, metavar="tool", help="one of the tools below; `tool --help` shows its options"
    )
    name = parser.parse_args(arguments[:1]).tool
    sys.argv = [f"{parser.prog} {name}", *arguments[1:]]
    return importlib.import_module(f"benchmarks.{available[name][0]}").main() or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
