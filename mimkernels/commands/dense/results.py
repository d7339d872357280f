"""What was read from one choice of layers of one model."""

from dataclasses import dataclass, field
from typing import Any

from mimkernels.commands.dense.config import Readout
from mimkernels.commands.dense.tasks import TASKS
from mimkernels.commands.dense.tasks.base import Reading


@dataclass
class ReadoutResult:
    """Scores of the tasks that were done, with predictions of the first test images for pictures.

    Attributes:
        readings: by the name of the task, in the order of ``TASKS``.
    """

    model: str
    readout: Readout
    channels: int
    grid: tuple[int, int]
    readings: dict[str, Reading[Any]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.model}, layer {self.readout.label}"

    @property
    def summary(self) -> str:
        """The main score of each task."""
        return ", ".join(TASKS[name].summary(reading.scores) for name, reading in self.readings.items())

    @property
    def worth(self) -> float:
        """By which readouts are compared: the score of the first task."""
        name, reading = next(iter(self.readings.items()))
        return TASKS[name].worth(reading.scores)

    @property
    def numbers(self) -> dict[str, Any]:
        """Everything but the pictures, for JSON."""
        return {
            "model": self.model,
            "layers": list(self.readout.layers),
            "channels": self.channels,
            "grid": list(self.grid),
            **{name: TASKS[name].numbers(reading.scores) for name, reading in self.readings.items()},
            "losses": {name: reading.losses for name, reading in self.readings.items() if reading.losses},
        }
