"""The ``mimkernels`` command. A subcommand's module is imported only when it is the one that runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from mimkernels._version import __version__


@dataclass(frozen=True)
class Command:
    """Where a subcommand lives: its module offers ``add_parser(subparsers)``, which sets ``run``."""

    module: str
    help: str


COMMANDS = {
    "info": Command("mimkernels.info", "versions, devices, libraries and backends, and what is missing"),
    "demo": Command("mimkernels.commands.demo.cli", "pre-train a small MAE on handwritten digits, write a report"),
    "pretrain": Command("mimkernels.commands.pretrain.cli", "pre-train a Vision Transformer with masked images"),
    "probe": Command("mimkernels.commands.probe.cli", "compare poolings of a frozen encoder's tokens"),
    "finetune": Command("mimkernels.commands.finetune.cli", "train a pre-trained encoder further, with labels"),
    "analyze": Command("mimkernels.commands.analyze.cli", "what heads and tokens of several models do, side by side"),
    "dense": Command("mimkernels.commands.dense.cli", "segmentation and depth read from frozen patches"),
    "bench": Command("mimkernels.commands.bench.cli", "micro-benchmarks: run them, compare runs, plot them"),
}


def build_parser(wanted: str | None = None) -> argparse.ArgumentParser:
    """The parser, complete for the subcommand ``wanted``; the others show their name and one line of help."""
    parser = argparse.ArgumentParser(
        prog="mimkernels", description="Masked Image Modeling with Vision Transformers: kernels and trainer."
    )
    parser.add_argument("--version", action="version", version=f"mimkernels {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
        if name == wanted:
            importlib.import_module(command.module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=command.help)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status.

    Args:
        argv: the arguments after the program's name; those of the process by default.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        build_parser().print_help(sys.stderr)
        return 2
    wanted = argv[0] if argv[0] in COMMANDS else None
    try:
        arguments = build_parser(wanted).parse_args(argv)
        return arguments.run(arguments) or 0
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "mimkernels":
            raise
        print(
            f"mimkernels {wanted}: {error.name!r} is not installed. Remedy: pip install 'mimkernels[train]'",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
