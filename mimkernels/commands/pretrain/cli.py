"""``mimkernels pretrain``: the parser alone; torch is imported when the command runs."""

import argparse
from collections.abc import Callable

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.presets import PRESETS
from mimkernels.engine.command import exit_code, guarded
from mimkernels.engine.settings import add_arguments
from mimkernels.engine.training.cli import add_run_options, settings_of


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``pretrain``; its ``run`` returns the exit code."""
    parser = subparsers.add_parser(
        "pretrain",
        help="pre-train a Vision Transformer on images, without labels or with",
        description="Pre-train a Vision Transformer by masked image modeling, or as a baseline beside it. Several "
        "processes or machines: start it with `torchrun ... -m mimkernels pretrain` or `accelerate launch -m "
        "mimkernels pretrain`.",
    )
    add_arguments(parser, PretrainConfig)
    add_run_options(parser, PRESETS)
    parser.set_defaults(run=_pretrain)


def _pretrain(args: argparse.Namespace) -> int:
    def prepare() -> Callable[[], int]:
        from mimkernels.commands.pretrain.run import Run

        run = Run(settings_of(args, PretrainConfig, PRESETS), resume=args.resume, overwrite=args.overwrite)
        return lambda: exit_code(run.execute().stopped_by)

    return guarded(prepare, args.debug)
