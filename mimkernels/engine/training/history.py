"""The numbers of a run: one JSON line per log entry, and the same in TensorBoard."""

import threading
from collections.abc import Mapping
from pathlib import Path

from mimkernels.engine import files
from mimkernels.engine.head_history import FIXED_IMAGES, HeadHistory
from mimkernels.engine.settings import is_of_type
from mimkernels.engine.training.heads import layer_means
from mimkernels.heads import HeadStatistics

_NAMES = ("loss", "lr", "images_per_second", "seconds")  # of every entry, as the report takes them


class History:
    """Log entries of a run in ``metrics.jsonl`` and ``tensorboard/``; entry ``step`` is the number of steps done."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        self.heads = HeadHistory(folder, first_step)
        self.during = HeadHistory(folder, first_step, FIXED_IMAGES)
        self.entries = [entry for entry in read_entries(self.path) if entry["step"] <= first_step]
        # What was logged after the checkpoint that training continues from will be logged again.
        files.write_text(self.path, "".join(map(files.json_line, self.entries)))
        self._file = self.path.open("a")
        self._excepthook, threading.excepthook = threading.excepthook, self._unless_told
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        entry = {"step": step, **values}
        self.entries.append(entry)
        self._file.write(files.json_line(entry))
        self._file.flush()
        for name, value in values.items():
            tag = f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}"
            self._board.add_scalar(tag, value, step)

    def add_heads(self, step: int, seen: HeadStatistics) -> None:
        self.heads.add(step, seen)
        for name, value in layer_means(seen).items():
            self._board.add_scalar(f"heads/{name}", value, step)

    def add_fixed_images(self, step: int, epoch: float, seen: HeadStatistics) -> None:
        self.during.add(step, seen, epoch=epoch)
        for name, value in layer_means(seen).items():
            self._board.add_scalar(f"during/{name}", value, step)

    def close(self) -> None:
        try:
            self._file.close()
            self._board.close()
        finally:
            threading.excepthook = self._excepthook

    def _unless_told(self, args: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread and raises what stopped it again, with its next entry: that is told, once.
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            self._excepthook(args)


def read_entries(path: Path) -> list[dict[str, float]]:
    """All whole log entries of a ``metrics.jsonl``."""
    return files.read_entries(path, lambda entry: all(is_of_type(entry.get(name), float) for name in _NAMES))
