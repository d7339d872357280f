"""Checkpoints of a run: the newest ones of a folder, and whether what a file holds is one."""

import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mimkernels.engine import files
from mimkernels.engine.settings import is_of_type
from mimkernels.models.checkpoint import DamagedFileError, read_file

FORMAT = 1
_NAME = re.compile(r"^step-(\d+)\.pt$")


class Newest(NamedTuple):
    """The newest whole checkpoint of a folder."""

    path: Path | None  # None if the folder has no checkpoint at all
    content: dict[str, Any]
    damaged: dict[Path, str]  # newer ones that are damaged, and how


class CheckpointFolder:
    """The checkpoints of one run: ``step-XXXXXXXX.pt``, of which the newest ``keep`` are kept, and ``final.pt``."""

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

    def newest_first(self) -> list[Path]:
        """The final checkpoint if the run was finished, then the others by falling steps."""
        final = [self.final] if self.final.exists() else []
        return final + [self.path(step) for step in reversed(self.steps())]

    def latest(self) -> Path | None:
        """The newest checkpoint by name, whole or not."""
        return next(iter(self.newest_first()), None)

    def load_newest(self) -> Newest:
        """Read the newest checkpoint that is whole.

        Raises:
            ValueError: there are checkpoints but all are damaged, or the newest whole one is of another program.
        """
        damaged: dict[Path, str] = {}
        for path in self.newest_first():
            try:
                return Newest(path, _load(path), damaged)
            except DamagedFileError as e:
                damaged[path] = str(e)
        if damaged:
            raise ValueError(
                f"{str(self.folder)!r} has no whole checkpoint: {'; '.join(damaged.values())}; --overwrite starts anew"
            )
        return Newest(None, {}, {})

    def save(self, content: dict[str, Any], *, final: bool = False) -> Path:
        path = self.final if final else self.path(content["step"])
        files.save(path, content)
        # Only after the new one is on the disk, so that there is a whole one at every moment.
        for step in self.steps()[: -self.keep]:
            self.path(step).unlink(missing_ok=True)
        return path

    def reopen(self, step: int, damaged: Iterable[Path] = ()) -> None:
        """Prepare to train on from `step`: rename the final checkpoint to its step, and `damaged` ones out of the way.

        ``latest`` then stays right, and a damaged checkpoint never stands for a newer one than the whole ones.
        """
        for path in damaged:
            os.replace(path, path.with_name(path.name + ".damaged"))
        if self.final.exists():
            os.replace(self.final, self.path(step))

    def clear(self) -> None:
        for path in self.newest_first():
            path.unlink(missing_ok=True)


def find(resume: str, output: str) -> Newest:
    """The checkpoint that ``--resume`` means: the newest whole one of a run folder, or the file itself.

    Raises:
        ValueError: there is no such file, or it is damaged (names a whole one beside it), or of another program.
    """
    folder = Path(output if resume == "auto" else resume)
    if resume == "auto" or folder.is_dir():
        return CheckpointFolder(folder / "checkpoints", 1).load_newest()
    return Newest(folder, load(folder), {})


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of `mimkernels pretrain` onto the CPU; no code in it is ever run.

    Raises:
        ValueError: there is none, it is damaged (names the newest whole one beside it), or of another program.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r} does not exist")
    try:
        return _load(path)
    except DamagedFileError as e:
        whole = whole_beside(path)
        if whole is None:
            raise
        raise DamagedFileError(f"{e}; {str(whole)!r} beside it is whole: name that one to go on from there") from None


def whole_beside(path: Path) -> Path | None:
    """The newest undamaged checkpoint in the folder of `path`, other than `path`; None if there is none."""
    others = (other for other in CheckpointFolder(path.parent, 1).newest_first() if other.name != path.name)
    return next((other for other in others if damage_of(other) is None), None)


def damage_of(path: Path) -> str | None:
    """Why a checkpoint's file cannot be read; None if it can."""
    try:
        read_file(path)
    except ValueError as e:
        return str(e)
    return None


def _load(path: Path) -> dict[str, Any]:
    content = read_file(path)
    if not is_checkpoint(content):
        held = sorted(map(str, content))[:6] if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{str(path)!r} is not a checkpoint of `mimkernels pretrain`: expected model, optimizer, step and "
            f"config, found {held}"
        )
    check_content(content, str(path))
    return content


def is_checkpoint(content: Any) -> bool:
    """Whether a file's content has the keys of a checkpoint of the trainer; ``check_content`` checks their values."""
    return isinstance(content, dict) and {"format", "step", "optimizer", "config"} <= content.keys()


def check_content(content: dict[str, Any], where: str) -> None:
    """Check the type of everything that is later taken from a checkpoint; ValueError names what is wrong.

    Names and shapes are compared with the model by ``state.check_fits``, and the settings in ``config`` are checked by
    the command that reads them.
    """
    if content.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {where!r} has format {content.get('format')!r}, this version reads format {FORMAT}"
        )
    for name, (fits, wanted) in _SCHEMA.items():
        if name not in content or not fits(content[name]):
            value = content.get(name)
            got = f"{type(value).__name__} {str(value)[:60]!r}" if name in content else "nothing"
            raise ValueError(f"checkpoint {where!r} is malformed: {name!r} must be {wanted}, got {got}")


def _is_number(value: Any) -> bool:
    return is_of_type(value, float) and math.isfinite(value) and value >= 0


def _is_count(value: Any) -> bool:
    return is_of_type(value, int) and value >= 0


def are_tensors(value: Any) -> bool:
    """Whether `value` is a dict of tensors, and not empty."""
    return isinstance(value, dict) and bool(value) and all(isinstance(item, torch.Tensor) for item in value.values())


_SCHEMA: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_is_count, "a whole number, 0 or more"),
    "epoch": (_is_number, "a number, 0 or more"),
    "seconds": (_is_number, "a number, 0 or more"),
    "model": (are_tensors, "named tensors, at least one"),
    "optimizer": (lambda value: isinstance(value, dict), "a dict"),
    "scaler": (lambda value: value is None or isinstance(value, dict), "a dict or None"),
    "config": (lambda value: isinstance(value, dict), "a dict"),
    "data": (lambda value: isinstance(value, str), "a string"),
    "effective_batch": (_is_count, "a whole number, 0 or more"),
}
