"""``mimkernels dense``: the parser alone; torch is imported when the command runs."""

import argparse
from collections.abc import Callable

from mimkernels.commands.dense.config import DenseConfig
from mimkernels.engine.command import guarded
from mimkernels.engine.settings import add_arguments, given_arguments


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``dense``; its ``run`` returns the exit code."""
    parser = subparsers.add_parser(
        "dense",
        help="segmentation, depth and joints that a linear layer reads from the patches of frozen encoders",
        description="Read labels and depths of every pixel, and places of joints, from the patch tokens of frozen "
        "encoders, by linear layers and by nearest neighbours: several models and layers side by side, as one page. "
        "Each model runs once over the images; its features are kept in the output folder.",
    )
    add_arguments(parser, DenseConfig)
    parser.add_argument(
        "--overwrite", action="store_true", help="forget what --output holds: features, and a report of other data"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=_dense)


def _dense(args: argparse.Namespace) -> int:
    def prepare() -> Callable[[], int]:
        from mimkernels.commands.dense.run import DenseRun

        run = DenseRun(DenseConfig(**given_arguments(args, DenseConfig)), overwrite=args.overwrite)

        def execute() -> int:
            run.execute()
            return 0

        return execute

    return guarded(prepare, args.debug)
