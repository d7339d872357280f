"""``mimkernels probe``: the parser alone; torch is imported when the command runs."""

import argparse
from collections.abc import Callable

from mimkernels.commands.probe.config import ProbeConfig
from mimkernels.engine.command import exit_code, guarded
from mimkernels.engine.settings import add_arguments, given_arguments


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``probe``; its ``run`` returns the exit code."""
    parser = subparsers.add_parser(
        "probe",
        help="compare poolings of a frozen encoder's tokens by what a linear layer reads from them",
        description="Probe a frozen Vision Transformer: train a linear layer on its tokens, pooled in several ways, "
        "and compare. A command that was interrupted, or is given further poolings, goes on with what --output holds.",
    )
    add_arguments(parser, ProbeConfig)
    parser.add_argument("--list", action="store_true", help="show the poolings and end")
    parser.add_argument("--overwrite", action="store_true", help="forget the results that --output holds")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=_probe)


def _probe(args: argparse.Namespace) -> int:
    if args.list:
        from mimkernels.nn import poolings

        for name, description in poolings().items():
            print(f"{name:10} {description}")
        return 0

    def prepare() -> Callable[[], int]:
        from mimkernels.commands.probe.run import ProbeRun

        run = ProbeRun(ProbeConfig(**given_arguments(args, ProbeConfig)), overwrite=args.overwrite)
        return lambda: exit_code(run.execute().stopped_by)

    return guarded(prepare, args.debug)
