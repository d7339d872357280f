"""Files that survive a crash: written beside their place, flushed to the disk, then moved into it."""

import contextlib
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mimkernels.engine.settings import Settings, is_of_type

_TEMPORARY = re.compile(r"^\..+\.[a-z0-9_]{8}\.tmp$")  # as atomic_file names them


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; it takes that name only if the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp makes files that only their owner reads
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        system_error = _system_error(e) if isinstance(e, Exception) else None
        if system_error is not None:
            raise OSError(system_error.errno, system_error.strerror, str(path)) from e
        raise
    _sync_folder(path.parent)


def _system_error(error: BaseException) -> OSError | None:
    """The system's error behind `error`, such as a full disk, which torch wraps in an error of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def _sync_folder(folder: Path) -> None:
    # The rename itself lives in the folder; without this a power cut may undo it.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def refusal(error: OSError, folder: Path) -> str:
    """A line that says what the system refused and for which file; for `folder` if it names none."""
    return f"{error.strerror or error}: {str(error.filename or folder)!r}"


def check_writable(output: str) -> None:
    """Raise ValueError unless the folder `output` can be made, or written to if it exists; what is empty names none."""
    if not output:  # an empty variable of a shell; a path would take it for the current folder
        raise ValueError("output is empty: name a folder with --output, . for the current one")
    folder = Path(output)
    try:
        str(folder).encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"output {str(folder)!r} is not UTF-8, where TensorBoard cannot write") from e
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"output {str(folder)!r}: {str(existing)!r} is a file, expected a folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"output {str(folder)!r}: no permission to write in {str(existing)!r}")


def saved_settings(folder: Path) -> Any:
    """What the ``config.json`` of a folder holds; None without a whole one."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return None


def check_own_folder(folder: Path, kind: type[Settings]) -> None:
    """Raise ValueError if `folder` holds results of a command whose settings are not those of `kind`.

    Its ``config.json`` tells, which every command writes; one that is damaged does not. Settings with other names are
    those of another command, or of this one in another version: the file does not say which.
    """
    saved = saved_settings(folder)
    if saved is None:
        return
    others = sorted(set(saved) - {f.name for f in fields(kind)}) if isinstance(saved, dict) else [type(saved).__name__]
    if others:
        shown = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
        raise ValueError(
            f"output {str(folder)!r} holds what another command, or another version of this one, wrote: its "
            f"config.json has {shown}, which are no settings of this command; choose another --output"
        )


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8. Bytes of a path that are not UTF-8, surrogates in Python, are written escaped: ``\\udce9``."""
    with atomic_file(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def json_numbers(value: Any) -> Any:
    """A value of dicts, lists, tensors and numbers for JSON, whose numbers are finite: others become None, null."""
    if isinstance(value, dict):
        return {key: json_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_numbers(item) for item in value]
    if isinstance(value, torch.Tensor):
        return json_numbers(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_line(entry: Mapping[str, Any]) -> str:
    """An entry of a log as one line of JSON; ``read_entries`` gives NaN for its numbers that are not finite."""
    return json.dumps(json_numbers(entry)) + "\n"


def _entry_of(value: Any, top: bool = True) -> Any:
    """With NaN for null where numbers are: in lists, and at the top; None is a setting elsewhere."""
    if isinstance(value, dict):
        return {key: math.nan if top and item is None else _entry_of(item, False) for key, item in value.items()}
    if isinstance(value, list):
        return [math.nan if item is None else _entry_of(item, False) for item in value]
    return value


def save(path: str | Path, content: dict[str, Any], writer: Callable[[Any, BinaryIO], None] = torch.save) -> None:
    """Write tensors and plain values, as ``torch.load`` reads them."""
    with atomic_file(path) as file:
        writer(content, file)


def read_entries(path: Path, fits: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Log entries of a file: one JSON object a line, with a step, that `fits` accepts. For null they have NaN.

    A last line that a crash cut short is skipped; other lines that are no entries are skipped with a warning.
    """
    entries: list[dict[str, Any]] = []
    if not path.is_file():
        return entries
    lines = path.read_text(errors="replace").splitlines()
    skipped = []
    for number, line in enumerate(lines, 1):
        try:
            entry = _entry_of(json.loads(line))
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict) and is_of_type(entry.get("step"), int) and fits(entry):
            entries.append(entry)
        elif entry is not None or number < len(lines):
            skipped.append(number)
    if skipped:
        more = f" and {len(skipped) - 1} more are no entries" if len(skipped) > 1 else " is no entry"
        warnings.warn(f"{str(path)!r}: line {skipped[0]}{more} of a run, left out", stacklevel=2)
    return entries


def sweep(*folders: Path) -> None:
    """Remove the temporary files that killed writers left in `folders`. The caller holds the run's lock."""
    for folder in folders:
        for path in folder.glob(".*.tmp"):
            if _TEMPORARY.match(path.name):
                path.unlink(missing_ok=True)
