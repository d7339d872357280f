"""What was read from one choice of layers of one model."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mimkernels.commands.dense.config import Readout
from mimkernels.commands.dense.metrics import DepthScores, SegmentationScores


@dataclass
class ReadoutResult:
    """Scores of the tasks that were done, and predictions of the first test images for pictures.

    Attributes:
        segmentation, depth: of the linear layers.
        knn: of the nearest patches.
        predictions: by task, ``[pictures, H, W]``.
        losses: by task, of every step.
    """

    model: str
    readout: Readout
    channels: int
    grid: tuple[int, int]
    segmentation: SegmentationScores | None = None
    knn: SegmentationScores | None = None
    depth: DepthScores | None = None
    predictions: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.model}, layer {self.readout.label}"

    @property
    def summary(self) -> str:
        """The main score of each task."""
        told = [
            f"{name} {100 * scores.miou:.1f} %"
            for name, scores in (("mIoU", self.segmentation), ("mIoU of k-NN", self.knn))
            if scores is not None
        ]
        return ", ".join(told + ([] if self.depth is None else [f"RMSE {self.depth.rmse:.3f} m"]))

    @property
    def numbers(self) -> dict[str, Any]:
        """Everything but the pictures, for JSON."""
        scores = {name: getattr(self, name) for name in ("segmentation", "knn", "depth")}
        return {
            "model": self.model,
            "layers": list(self.readout.layers),
            "channels": self.channels,
            "grid": list(self.grid),
            **{name: value._asdict() for name, value in scores.items() if value is not None},
            "losses": self.losses,
        }


@dataclass
class Pictured:
    """Test images of the report and what is true of them."""

    images: Tensor  # [n, 3, S, S] uint8
    labels: Tensor  # [n, S, S]
    depths: Tensor  # [n, S, S]
