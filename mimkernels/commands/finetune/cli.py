"""``mimkernels finetune``: the parser alone; torch is imported when the command runs."""

import argparse
from collections.abc import Callable

from mimkernels.commands.finetune.config import FinetuneConfig
from mimkernels.commands.finetune.presets import PRESETS
from mimkernels.engine.command import exit_code, guarded
from mimkernels.engine.settings import add_arguments
from mimkernels.engine.training.cli import add_run_options, settings_of


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``finetune``; its ``run`` returns the exit code."""
    parser = subparsers.add_parser(
        "finetune",
        help="train a pre-trained encoder and a classifier on labelled images",
        description="Fine-tune a Vision or Swin Transformer: the encoder of a run, a checkpoint or a timm name is "
        "trained with a new classifier, lower layers at lower learning rates. Several processes: as `pretrain`.",
    )
    add_arguments(parser, FinetuneConfig)
    add_run_options(parser, PRESETS)
    parser.add_argument("--dry-run", action="store_true", help="show what would be trained, layer by layer, and end")
    parser.set_defaults(run=_finetune)


def _finetune(args: argparse.Namespace) -> int:
    def prepare() -> Callable[[], int]:
        from mimkernels.commands.finetune.run import FinetuneRun

        config = settings_of(args, FinetuneConfig, PRESETS)
        run = FinetuneRun(config, resume=args.resume, overwrite=args.overwrite)

        def execute() -> int:
            if args.dry_run:
                run.show()
                return 0
            return exit_code(run.execute().stopped_by)

        return execute

    return guarded(prepare, args.debug)
