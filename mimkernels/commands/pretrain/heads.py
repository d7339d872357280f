"""What attention heads do during training: recorded every so often, shown in the report, and as terms of the loss."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.engine import files
from mimkernels.engine.figures import data_address
from mimkernels.heads import HeadStatistics, parse_regularizers, plot_overview, regularization_loss
from mimkernels.heads.presets import QUANTITIES
from mimkernels.ops.attention.spec import STATISTICS


class HeadWatch:
    """Which head statistics a step asks of the model, and what becomes of them.

    Args:
        config: ``head_stats``, ``head_stats_every`` and ``regularize`` are read.
        num_prefix: prefix tokens of the encoder.

    Raises:
        ValueError: a name that is unknown, or that cannot be had from row statistics alone.
    """

    def __init__(self, config: PretrainConfig, num_prefix: int) -> None:
        self.every = config.head_stats_every
        self.num_prefix = num_prefix
        self.names = tuple(name for name in config.head_stats.replace(" ", "").split(",") if name)
        known = [name for name, quantity in QUANTITIES.items() if not quantity.inputs and not name.startswith("cls_")]
        for name in self.names:
            if name not in known:
                raise ValueError(f"head_stats: unknown statistic {name!r}; known: {', '.join(known)}")
        self.weights = parse_regularizers([f"{name}={value}" for name, value in config.regularize.items()])
        self._seen: HeadStatistics | None = None

    def wanted(self, step: int) -> tuple[str, ...]:
        """Row statistics that step number ``step`` (counted from 1) needs from the model."""
        names = set(self.weights)
        if self._due(step):
            if self._seen is None:
                self._seen = HeadStatistics(quantities=self.names, num_prefix=self.num_prefix)
            names.update(self._seen.row_stats)
        return tuple(name for name in STATISTICS if name in names)

    def penalty(self, stats: list[Mapping[str, Tensor]] | None) -> Tensor | float:
        """The weighted terms to add to the loss; 0 without any."""
        if not self.weights:
            return 0.0
        assert stats is not None
        return regularization_loss(self.weights, stats, num_prefix=self.num_prefix)

    def see(self, stats: list[Mapping[str, Tensor]] | None) -> None:
        """Take in one forward pass's statistics, if the step is due."""
        if self._seen is not None:
            assert stats is not None
            for layer, values in enumerate(stats):
                self._seen.update(layer, values)

    def collect(self) -> HeadStatistics | None:
        """What the due step saw, over all processes; None at other steps."""
        seen, self._seen = self._seen, None
        return None if seen is None else seen.reduce()

    def _due(self, step: int) -> bool:
        return bool(self.names) and (step == 1 or step % self.every == 0)


class HeadHistory:
    """Recorded head statistics of a run in ``heads.jsonl``, one line per recorded step."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.path = folder / "heads.jsonl"
        entries = files.read_entries(self.path, _has_statistics)
        self.entries = [entry for entry in entries if entry["step"] <= first_step]
        if self.path.is_file():
            files.write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in self.entries))

    def add(self, step: int, seen: HeadStatistics) -> None:
        self.entries.append({"step": step, "heads": seen.to_dict()})
        with self.path.open("a") as file:
            file.write(json.dumps(self.entries[-1]) + "\n")

    def picture(self) -> str | None:
        """First and last recorded step side by side as a PNG ``data:`` address; None if nothing was recorded."""
        if not self.entries:
            return None
        chosen = self.entries[:1] if len(self.entries) == 1 else [self.entries[0], self.entries[-1]]
        recorded = {f"step {entry['step']:,}": HeadStatistics.from_dict(entry["heads"]) for entry in chosen}
        buffer = io.BytesIO()
        plot_overview(recorded).savefig(buffer, format="png", dpi=130)
        return data_address(buffer.getvalue())


def layer_means(seen: HeadStatistics) -> dict[str, float]:
    """``name/layer_01`` and so on: the mean over heads of every quantity and layer."""
    made = {}
    for name in seen.names:
        per_layer = enumerate(seen.layer_mean(name).tolist(), 1)
        made.update({f"{name}/layer_{number:02d}": value for number, value in per_layer})
    return made


def _has_statistics(entry: Mapping[str, Any]) -> bool:
    try:
        HeadStatistics.from_dict(entry["heads"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return True
