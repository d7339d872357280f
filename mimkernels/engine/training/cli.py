"""What the parsers of commands that train have in common; imports no torch."""

import argparse
from collections.abc import Mapping
from typing import Any, TypeVar

from mimkernels.engine.settings import given_arguments, require_unset
from mimkernels.engine.training.config import UNREAD, TrainingConfig

Config = TypeVar("Config", bound=TrainingConfig)


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


def settings_of(args: argparse.Namespace, kind: type[Config], presets: Mapping[str, dict[str, Any]]) -> Config:
    """What was given, over the settings of the run that is continued or the defaults."""
    named = given_arguments(args, kind)
    given = {**presets.get(args.preset, {}), **named}
    if args.resume is None:
        config = kind(**given)
    else:
        from mimkernels.engine.training.resume import settings_to_continue

        saved = settings_to_continue(args.resume, given.get("output", kind().output), kind)
        config = kind.continued(saved, given)
    # Presets and checkpoints, over which another schedule may be given, can hold these all the same.
    unread = [name for name in UNREAD.get(config.schedule, ()) if name in named]
    require_unset(config, unread, f"with schedule {config.schedule!r}")
    return config
