"""``mimkernels pretrain``: the parser alone; torch is imported when the command runs."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.presets import PRESETS
from mimkernels.commands.pretrain.training import TrainingConfig
from mimkernels.engine.command import exit_code, guarded
from mimkernels.engine.settings import add_arguments, given_arguments

Config = TypeVar("Config", bound=TrainingConfig)


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


def add_run_options(parser: argparse.ArgumentParser, presets: Mapping[str, Any]) -> None:
    """Options of a command that trains and is no setting: how a run begins, and a recipe among `presets`."""
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
        choices=tuple(presets),
        help="a published recipe: settings in place of the defaults (with --resume: of the checkpoint's); options that "
        "are given come first",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run that --output holds")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _pretrain(args: argparse.Namespace) -> int:
    def prepare() -> Callable[[], int]:
        from mimkernels.commands.pretrain.run import Run

        run = Run(settings_of(args, PretrainConfig, PRESETS), resume=args.resume, overwrite=args.overwrite)
        return lambda: exit_code(run.execute().stopped_by)

    return guarded(prepare, args.debug)


def settings_of(args: argparse.Namespace, kind: type[Config], presets: Mapping[str, dict[str, Any]]) -> Config:
    """What was given, over the settings of the run that is continued or the defaults."""
    given = {**presets.get(args.preset, {}), **given_arguments(args, kind)}
    if args.resume is None:
        return kind(**given)
    from mimkernels.commands.pretrain.resume import settings_to_continue

    saved = settings_to_continue(args.resume, given.get("output", kind().output), kind)
    return kind.continued(saved, given)
