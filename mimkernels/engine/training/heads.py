"""What attention heads do during training: recorded every so often, shown in the report, and as terms of the loss."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mimkernels.data.batches import Augmentation, picture_batch
from mimkernels.data.sources import Source
from mimkernels.engine.head_history import QUANTITIES as ON_FIXED_IMAGES
from mimkernels.engine.training.config import TrainingConfig
from mimkernels.heads import HeadStatistics, capture, parse_regularizers, regularization_loss
from mimkernels.heads.presets import QUANTITIES
from mimkernels.ops.attention.spec import STATISTICS

_FIXED, _AT_ONCE = 64, 16  # images


class HeadWatch:
    """Which head statistics a step asks of the model, and what becomes of them.

    Args:
        config: ``head_stats``, ``head_stats_every`` and ``regularize`` are read.
        num_prefix: prefix tokens of the encoder.

    Attributes:
        windows: per image, of every attention layer, whose mean counts for the image; 1 of each if None.

    Raises:
        ValueError: a name that is unknown, or that cannot be had from row statistics alone.
    """

    def __init__(self, config: TrainingConfig, num_prefix: int) -> None:
        self.every = config.head_stats_every
        self.num_prefix = num_prefix
        self.windows: list[int] | None = None
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
            windows = [1] * len(stats) if self.windows is None else self.windows
            for layer, (values, number) in enumerate(zip(stats, windows, strict=True)):
                self._seen.update(layer, values, windows=number)

    def collect(self) -> HeadStatistics | None:
        """What the due step saw, over all processes; None at other steps."""
        seen, self._seen = self._seen, None
        return None if seen is None else seen.reduce()

    def _due(self, step: int) -> bool:
        return bool(self.names) and (step == 1 or step % self.every == 0)


class FixedImages:
    """The encoder's heads on some images, whole and the same ones every time: what changes is the encoder.

    Args:
        source: images that are not trained on, if there are any; some spread over it are taken.
        augmentation: of the run; images are not augmented by it, but cropped to their central square.

    Raises:
        ValueError: no image can be read.
    """

    def __init__(self, source: Source, augmentation: Augmentation) -> None:
        self.images, _ = picture_batch(source, augmentation, _FIXED)
        if not len(self.images):
            raise ValueError(f"analyze_every: none of the images of {source.name!r} can be read")

    @torch.no_grad()
    def see(self, model: Any, device: torch.device) -> HeadStatistics:
        """Statistics of the encoder of a `model` in eval mode; no random number is drawn."""
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (model.mean, model.std))
        with capture(model.encoder, ON_FIXED_IMAGES, unit="pixel", accumulate=True) as heads:
            for images in self.images.split(_AT_ONCE):
                model.encoder.forward_features((images.to(device) / 255 - mean) / std)
        return heads.statistics


def layer_means(seen: HeadStatistics) -> dict[str, float]:
    """``name/layer_01`` and so on: the mean over heads of every quantity and layer."""
    made = {}
    for name in seen.names:
        per_layer = enumerate(seen.layer_mean(name).tolist(), 1)
        made.update({f"{name}/layer_{number:02d}": value for number, value in per_layer})
    return made
