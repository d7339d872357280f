"""The test of a fine-tuned model: accuracies, which classes it confuses, and where it is sure and wrong."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mimkernels.data.batches import Augmentation
from mimkernels.data.labelled import EncoderImages, LabelledImages, in_order
from mimkernels.engine.command import TrainingError
from mimkernels.models.finetuned import Finetuned

__all__ = ["Confusion", "Mistake", "Tested", "test_all"]


class Confusion(NamedTuple):
    """Images of one class that were taken for another."""

    true: int
    named: int
    images: int
    share: float  # of the images of the true class


class Mistake(NamedTuple):
    """An image that the model named wrongly."""

    image: Tensor  # [C, S, S] uint8
    label: str  # of its source
    true: int
    named: int
    probability: float  # of what it was named


@dataclass
class Tested:
    """What a model makes of the test images.

    Attributes:
        positions: ``[n]`` int64 of the images in their split; those that cannot be read are left out.
        targets: ``[n]`` int64.
        probabilities: ``[n, classes]`` fp32.
    """

    positions: Tensor
    targets: Tensor
    probabilities: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def named(self) -> Tensor:
        """``[n]`` the class with the largest probability."""
        return self.probabilities.argmax(1)

    @property
    def accuracy(self) -> float:
        return float((self.named == self.targets).double().mean())

    @property
    def top5(self) -> float | None:
        """Share of images whose class is among the five with the largest probability; None of five classes or fewer."""
        if self.probabilities.shape[1] <= 5:
            return None
        best = self.probabilities.topk(5, 1).indices
        return float((best == self.targets[:, None]).any(1).double().mean())

    @property
    def standard_error(self) -> float:
        """Of the accuracy, from the binomial distribution."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / max(1, len(self)))

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return float(-self.probabilities.gather(1, self.targets[:, None]).double().clamp(min=1e-30).log().mean())

    @property
    def matrix(self) -> Tensor:
        """``[classes, classes]`` int64: images by true class (rows) and by what they were named."""
        classes = self.probabilities.shape[1]
        return torch.bincount(self.targets * classes + self.named, minlength=classes * classes).view(classes, classes)

    def by_class(self) -> list[tuple[int, float, float]]:
        """For every class its images, the share of them that was named so, and of those named so that are of it."""
        matrix = self.matrix
        images, named, right = matrix.sum(1), matrix.sum(0), matrix.diagonal()
        recall, precision = (right / count for count in (images.double(), named.double()))  # NaN of none
        return list(zip(images.tolist(), recall.tolist(), precision.tolist(), strict=True))

    def confusions(self, count: int) -> list[Confusion]:
        """The pairs of classes that are confused most often, at most `count`."""
        matrix = self.matrix
        wrong = matrix - torch.diag(matrix.diagonal())
        found = wrong.flatten().sort(descending=True, stable=True)
        pairs = zip(found.values[:count].tolist(), found.indices[:count].tolist(), strict=True)
        classes = len(matrix)
        return [
            Confusion(place // classes, place % classes, times, times / int(matrix[place // classes].sum()))
            for times, place in pairs
            if times
        ]

    def mistakes(self, count: int, images: LabelledImages, augmentation: Augmentation) -> list[Mistake]:
        """The images that were named wrongly with the largest probability, at most `count`, the surest first."""
        sure, named = self.probabilities.max(1)
        wrong = (named != self.targets).nonzero().flatten()
        chosen = wrong[sure[wrong].argsort(descending=True, stable=True)][:count]
        pictures = EncoderImages(images, augmentation, 0, False)
        found = []
        for row in chosen.tolist():
            position = int(self.positions[row])
            image, _, _ = pictures[(0, position)]
            if image is not None:
                label = images.label(position)
                found.append(Mistake(image, label, int(self.targets[row]), int(named[row]), float(sure[row])))
        return found

    def to_json(self, classes: list[str]) -> str:
        """The numbers, for programs."""
        return json.dumps({
            "images": len(self), "accuracy": self.accuracy, "standard_error": self.standard_error, "top5": self.top5,
            "loss": self.loss, "classes": classes, "confusion": self.matrix.tolist(),
        }, indent=1) + "\n"  # fmt: skip


def test_all(
    model: Finetuned,
    images: LabelledImages,
    augmentation: Augmentation,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> Tested:
    """Test a model in eval mode on all images that can be read.

    Raises:
        TrainingError: none can.
    """
    positions, probabilities = [], []
    broken: list[tuple[int, str]] = []
    loader = in_order(EncoderImages(images, augmentation, 0, False), batch_size, workers, device.type == "cuda")
    with torch.no_grad():
        for batch in loader:
            broken += batch.broken
            if batch.images is not None:
                pixels, targets = batch.images.to(device), images.targets[batch.positions].to(device)
                probabilities.append(model(pixels, targets=targets).logits.float().softmax(1).cpu())
                positions.append(batch.positions)
    if not positions:
        raise TrainingError(f"none of the {len(images)} test images can be read")
    if broken:
        warnings.warn(f"{images.unread(broken, 'test images')}; they are left out", stacklevel=2)
    order = torch.cat(positions)
    return Tested(order, images.targets[order], torch.cat(probabilities))
