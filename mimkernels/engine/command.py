"""How a command ends: bad input and failed training are one line and an exit code, anything else is a bug."""

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_BAD_INPUT, _FAILED = 2, 1
_PACKAGE = Path(__file__).parents[1]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what to do next.

    Bad arguments are ValueError, raised before any file is written.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does, and says the same."""


@contextlib.contextmanager
def told_failures(
    output: Path, device: "torch.device", remedy: str, going_on: Callable[[], str] | None = None
) -> Iterator[None]:
    """Turn a want of memory, a lost process and what the file system refuses into ``TrainingError``.

    An interruption says how to go on.

    Args:
        output: the folder that is written.
        device: where the work is done.
        remedy: what to do where its memory does not suffice.
        going_on: says how to go on, when files can be written again or after an interruption.
    """
    import torch

    from mimkernels.engine import files
    from mimkernels.engine.hardware import device_name

    def more() -> str:
        return "" if going_on is None else f"; {going_on()}"

    try:
        yield
    except (RuntimeError, MemoryError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0].strip()
        lost = _lost_process(e)
        if lost is not None:
            raise TrainingError(f"{lost} ({reason}){more()}") from e
        # Of the CPU's memory torch says so in words alone.
        wants = isinstance(e, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(e)
        if not wants:
            raise
        raise TrainingError(f"out of memory on {device_name(device)}: {remedy} ({reason})") from e
    except OSError as e:
        raise TrainingError(f"{files.refusal(e, output)}{more()}") from e
    except KeyboardInterrupt as e:
        raise type(e)(*(() if going_on is None else (going_on(),))) from e


def _lost_process(error: Exception) -> str | None:
    """Which other process ended, and what may have ended it; None of other errors. Of most torch says so in words."""
    import torch

    text = str(error)
    if text.startswith("DataLoader worker (pid"):
        return "a data-loading process ended, perhaps for want of memory: --workers 0 does without, fewer take less"
    if isinstance(error, getattr(torch.distributed, "DistError", ())) or "/gloo/transport/" in text:
        return "another process of the run ended or cannot be reached, see what it says"
    return None


def guarded(prepare: Callable[[], Callable[[], int]], debug: bool) -> int:
    """Run a command: bad input is one line and exit code 2, failed training one line and 1, a bug a traceback.

    Args:
        prepare: checks everything and returns what then does the work, whose result is the exit code.
        debug: show the traceback of every error.
    """
    with _warnings_of_one_line(), _termination_raised():
        try:
            return _guarded(prepare, debug)
        except KeyboardInterrupt as e:  # while it trains the second one: the first ends training in good order
            number = signal.SIGTERM if isinstance(e, Terminated) else signal.SIGINT
            return _complain(f"interrupted{f'; {e}' if str(e) else ''}", exit_code(number))


def _guarded(prepare: Callable[[], Callable[[], int]], debug: bool) -> int:
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


@contextlib.contextmanager
def _termination_raised() -> Iterator[None]:
    """Inside the block, SIGTERM raises ``Terminated`` in the main thread, unless somebody else handles it."""

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process
        raise Terminated

    here = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _warnings_of_one_line() -> Iterator[None]:
    """Inside the block, this package's warnings are shown without the place in its code; others as Python does."""
    former: Callable[..., str] = warnings.formatwarning

    def formatted(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        if category is UserWarning and Path(filename).is_relative_to(_PACKAGE):
            return f"mimkernels: warning: {message}\n"
        return former(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = former


def _complain(error: Exception | str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    hint = ""
    if isinstance(error, ModuleNotFoundError):
        hint = "; pip install 'mimkernels[train]'"
    print(f"mimkernels: error{where}: {error}{hint}", file=sys.stderr, flush=True)
    return code


def exit_code(signal_number: int) -> int:
    """The exit code of a command that a signal ended, as shells count; 0 if none did."""
    return 128 + signal_number if signal_number else 0
