"""The numbers of a run: one JSON line per log entry, and the same in TensorBoard."""

import json
from collections.abc import Mapping
from pathlib import Path

from mimkernels.stats import HeadStatistics
from mimkernels.train.checkpoint import write_text
from mimkernels.train.heads import HeadHistory, layer_means


class History:
    """Log entries of a run in ``metrics.jsonl`` and ``tensorboard/``; entry ``step`` is the number of steps done."""

    def __init__(self, folder: Path, first_step: int, heads: HeadHistory) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        self.heads = heads
        self.entries = [entry for entry in read_entries(self.path) if entry["step"] <= first_step]
        # What was logged after the checkpoint that training continues from will be logged again.
        write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in self.entries))
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        entry = {"step": step, **values}
        self.entries.append(entry)
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"train/{name}", value, step)

    def add_heads(self, step: int, seen: HeadStatistics) -> None:
        self.heads.add(step, seen)
        for name, value in layer_means(seen).items():
            self._board.add_scalar(f"heads/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_entries(path: Path) -> list[dict[str, float]]:
    """All whole lines; a crash may have left half of a last one."""
    entries: list[dict[str, float]] = []
    if not path.is_file():
        return entries
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries
