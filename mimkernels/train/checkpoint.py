"""Files that survive a crash: written beside their place, flushed to the disk, then moved into it."""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

FORMAT = 1
_NAME = re.compile(r"^step-(\d+)\.pt$")


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
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


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


def check_writable(folder: Path) -> None:
    """Raise ValueError unless `folder` can be made, or written to if it exists."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"output {str(folder)!r} is not UTF-8, where TensorBoard cannot write") from e
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"output {str(folder)!r}: {str(existing)!r} is a file, expected a folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"output {str(folder)!r}: no permission to write in {str(existing)!r}")


def write_text(path: str | Path, text: str) -> None:
    """UTF-8; bytes of a path that were none, surrogates to Python, are written as it shows them: ``\\udce9``."""
    with atomic_file(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def save(path: str | Path, content: dict[str, Any], writer: Callable[[Any, BinaryIO], None] = torch.save) -> None:
    with atomic_file(path) as file:
        writer(content, file)


class CheckpointFolder:
    """``step-XXXXXXXX.pt`` files of one run, the newest ``keep`` of them, besides ``final.pt``."""

    def __init__(self, folder: str | Path, keep: int) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(m[1]) for entry in self.folder.iterdir() if (m := _NAME.match(entry.name)))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.pt"

    @property
    def final(self) -> Path:
        return self.folder / "final.pt"

    def latest(self) -> Path | None:
        """The final checkpoint if the run was finished, otherwise the one with the most steps."""
        if self.final.exists():
            return self.final
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def save(self, content: dict[str, Any], *, final: bool = False) -> Path:
        path = self.final if final else self.path(content["step"])
        save(path, content)
        # Only after the new one is on the disk: at no moment is there none.
        for step in self.steps()[: -self.keep]:
            self.path(step).unlink(missing_ok=True)
        return path

    def reopen(self, step: int) -> None:
        """Training goes on from the final checkpoint: it becomes one of the others, so that ``latest`` stays right."""
        if self.final.exists():
            os.replace(self.final, self.path(step))

    def clear(self) -> None:
        for path in [self.final, *map(self.path, self.steps())]:
            path.unlink(missing_ok=True)


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this trainer onto the CPU; no code in it is ever run."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # zip, pickle and torch each have their own, some many lines long
        raise ValueError(
            f"checkpoint {str(path)!r} cannot be read, it is damaged or no checkpoint: {str(e).partition(chr(10))[0]}"
        ) from e
    if not isinstance(content, dict) or "step" not in content or "optimizer" not in content:
        held = sorted(content)[:6] if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{str(path)!r} is not a checkpoint of `mimkernels pretrain`: expected model, optimizer, step and "
            f"config, found {held}"
        )
    if content.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {str(path)!r} has format {content.get('format')}, this version reads format {FORMAT}"
        )
    return content
