"""``mimkernels demo``: ``pretrain``, then ``probe``, with settings for handwritten digits on two CPU cores."""

import argparse
from collections.abc import Callable

from mimkernels.engine.command import exit_code, guarded


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``demo``; its ``run`` returns the exit code."""
    parser = subparsers.add_parser(
        "demo",
        help="pre-train a small MAE on handwritten digits, probe its features, write a report",
        description="Pre-train a small masked autoencoder on scikit-learn's handwritten digits (no download) in "
        "about two minutes on two CPU cores, read its frozen features with linear probes, and write a report.",
    )
    parser.add_argument("--output", "-o", default="runs/demo", metavar="DIR", help="run folder (default: runs/demo)")
    parser.add_argument("--epochs", type=int, default=None, metavar="N", help="train shorter or longer")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    def prepare() -> Callable[[], int]:
        from mimkernels.commands.demo.run import prepare_demo

        run = prepare_demo(args.output, args.epochs)

        def execute() -> int:
            stopped_by = run.execute().stopped_by
            if not stopped_by:
                print(run.closing_words)
            return exit_code(stopped_by)

        return execute

    return guarded(prepare, args.debug)
