"""``mimkernels pretrain``, ``probe`` and ``demo``. Only the parsers are built here; torch is imported when one runs."""

import argparse
import os
import signal
import sys
from collections.abc import Callable

from mimkernels.train.config import PretrainConfig, add_arguments, given_arguments
from mimkernels.train.errors import TrainingError
from mimkernels.train.probe_config import ProbeConfig

_BAD_INPUT, _FAILED = 2, 1


def add_pretrain_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``pretrain``; its ``func`` (and ``run``) returns the exit code."""
    parser = subparsers.add_parser(
        "pretrain",
        help="pre-train a Vision Transformer on images without labels",
        description="Pre-train a Vision Transformer by masked image modeling. Several processes or machines: start it "
        "with `torchrun ... -m mimkernels.train` or `accelerate launch -m mimkernels.train`.",
    )
    add_arguments(parser)
    _add_run_options(parser)
    parser.set_defaults(func=_pretrain, run=_pretrain)


def add_probe_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``probe``; its ``func`` (and ``run``) returns the exit code."""
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
    parser.set_defaults(func=_probe, run=_probe)


def add_demo_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``demo``; its ``func`` (and ``run``) returns the exit code."""
    parser = subparsers.add_parser(
        "demo",
        help="pre-train a small MAE on handwritten digits, probe its features, write a report",
        description="Pre-train a small masked autoencoder on scikit-learn's handwritten digits (no download) in "
        "about two minutes on two CPU cores, read its frozen features with linear probes, and write a report.",
    )
    parser.add_argument("--output", default="runs/demo", metavar="DIR", help="run folder (default: runs/demo)")
    parser.add_argument("--epochs", type=int, default=None, metavar="N", help="train shorter or longer")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(func=_demo, run=_demo)


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
    parser.add_argument("--overwrite", action="store_true", help="replace the run that --output holds")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _pretrain(args: argparse.Namespace) -> int:
    def prepare() -> Callable[[], int]:
        from mimkernels.train.run import Run

        run = Run(_config(args), resume=args.resume, overwrite=args.overwrite)
        return lambda: _exit_code(run.execute().stopped_by)

    return _guarded(prepare, args.debug)


def _probe(args: argparse.Namespace) -> int:
    if args.list:
        from mimkernels.nn import poolings

        for name, description in poolings().items():
            print(f"{name:10} {description}")
        return 0

    def prepare() -> Callable[[], int]:
        from mimkernels.train.probe_run import ProbeRun

        run = ProbeRun(ProbeConfig(**given_arguments(args, ProbeConfig)), overwrite=args.overwrite)
        return lambda: _exit_code(run.execute().stopped_by)

    return _guarded(prepare, args.debug)


def _config(args: argparse.Namespace) -> PretrainConfig:
    """What was given, over the settings of the run that is continued or the defaults."""
    from mimkernels.train.settings import settings_to_continue

    given = given_arguments(args)
    if args.resume is None:
        return PretrainConfig(**given)
    saved = settings_to_continue(args.resume, given.get("output", PretrainConfig().output))
    return PretrainConfig.from_dict({**saved, **given})


def _demo(args: argparse.Namespace) -> int:
    def prepare() -> Callable[[], int]:
        from mimkernels.train.presets import prepare_demo

        run, go_on = prepare_demo(args.output, args.epochs)

        def execute() -> int:
            result = run.execute()
            stopped_by = result.stopped_by
            if not stopped_by:
                stopped_by, closing_words = go_on(result)
                print(closing_words)
            return _exit_code(stopped_by)

        return execute

    return _guarded(prepare, args.debug)


def _guarded(prepare: Callable[[], Callable[[], int]], debug: bool) -> int:
    """Bad input is one line and exit code 2, failed training one line and 1; anything else is a bug and shows."""
    try:
        execute = prepare()
    except (ValueError, TypeError, NotImplementedError, OSError, ImportError, TrainingError) as e:
        if debug:
            raise
        return _complain(e, _BAD_INPUT)
    try:
        return execute()
    except (TrainingError, OSError) as e:
        if debug:
            raise
        return _complain(e, _FAILED)
    except KeyboardInterrupt:  # the second one: the first ends training in good order
        return _complain("interrupted", _exit_code(signal.SIGINT))


def _complain(error: Exception | str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    hint = ""
    if isinstance(error, ModuleNotFoundError):
        hint = "; pip install 'mimkernels[train]'"
    print(f"mimkernels: error{where}: {error}{hint}", file=sys.stderr, flush=True)
    return code


def _exit_code(signal_number: int) -> int:
    return 128 + signal_number if signal_number else 0
