"""``mimkernels analyze``: the parser alone; torch is imported when the command runs."""

import argparse
from collections.abc import Callable

from mimkernels.commands.analyze.config import AnalyzeConfig
from mimkernels.engine.command import guarded
from mimkernels.engine.settings import add_arguments, given_arguments


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``analyze``; its ``run`` returns the exit code."""
    parser = subparsers.add_parser(
        "analyze",
        help="what the heads and tokens of several models do, side by side, as one page",
        description="Draw the figures of the papers on Masked Image Modeling for any models, side by side: attention "
        "distance, entropy, differences between heads, CKA, [cls] and patches. Each model runs once over the images; "
        "a command that is given one more model runs that one.",
    )
    add_arguments(parser, AnalyzeConfig)
    parser.add_argument("--json", action="store_true", help="print every number as JSON; progress goes to stderr")
    parser.add_argument("--overwrite", action="store_true", help="forget what --output holds of earlier passes")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=_analyze)


def _analyze(args: argparse.Namespace) -> int:
    def prepare() -> Callable[[], int]:
        from mimkernels.commands.analyze.run import AnalyzeRun

        config = AnalyzeConfig(**given_arguments(args, AnalyzeConfig))
        run = AnalyzeRun(config, overwrite=args.overwrite, as_json=args.json)

        def execute() -> int:
            run.execute()
            return 0

        return execute

    return guarded(prepare, args.debug)
