"""``mimkernels bench run | compare | plot``. What a subcommand needs is imported when it runs."""

from __future__ import annotations

import argparse
import importlib

_COMMANDS = {
    "run": "time the ops on this machine, write JSON",
    "compare": "two results side by side; exit status 1 on a regression beyond the noise",
    "plot": "speed-ups, roofline and scaling curves of a run, as PNG, tables and a page",
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="micro-benchmarks against plain PyTorch, torch.compile and SDPA",
        description="Micro-benchmarks: every version of a case runs in one process, interleaved, after a check that "
        "all give the same; beside each figure stands the limit that was measured in the same run.",
    )
    commands = parser.add_subparsers(dest="bench", metavar="command", required=True)
    for name, what in _COMMANDS.items():
        module = importlib.import_module(f"mimkernels.commands.bench.{name}")
        command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
