"""``mimkernels pretrain``: the parser alone; torch is imported when the command runs."""

import argparse
from collections.abc import Callable

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.presets import PRESETS
from mimkernels.engine.command import exit_code, guarded
from mimkernels.engine.settings import add_arguments, given_arguments


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
    _add_run_options(parser)
    parser.set_defaults(run=_pretrain)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        default=None,
        metavar="PATH|auto",
        help="continue the run in --output where its newest checkpoint ends (start it if there is none), or the "
        "checkpoint or run folder PATH; settings not given are the checkpoint's",
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="a published recipe: settings in place of the defaults (with --resume: of the checkpoint's); options that "
        "are given come first",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run that --output holds")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _pretrain(args: argparse.Namespace) -> int:
    def prepare() -> Callable[[], int]:
        from mimkernels.commands.pretrain.run import Run

        run = Run(_config(args), resume=args.resume, overwrite=args.overwrite)
        return lambda: exit_code(run.execute().stopped_by)

    return guarded(prepare, args.debug)


def _config(args: argparse.Namespace) -> PretrainConfig:
    """What was given, over the settings of the run that is continued or the defaults."""
    given = {**PRESETS.get(args.preset, {}), **given_arguments(args, PretrainConfig)}
    if args.resume is None:
        return PretrainConfig(**given)
    from mimkernels.commands.pretrain.resume import settings_to_continue

    saved = settings_to_continue(args.resume, given.get("output", PretrainConfig().output))
    return PretrainConfig.from_dict({**saved, **given})
