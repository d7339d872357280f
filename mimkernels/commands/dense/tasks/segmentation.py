"""Classes of pixels, by a linear layer and by the nearest patches."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mimkernels._palette import SERIES
from mimkernels.commands.dense.charts import bar_chart
from mimkernels.commands.dense.data import DenseData, DenseImages
from mimkernels.commands.dense.heads import LinearSegmentation, NearestPatches, predict, train
from mimkernels.commands.dense.metrics import IGNORED, SegmentationScores, confusion, segmentation_scores
from mimkernels.commands.dense.tasks.base import ChartSection, Job, PictureRow, Reading, Task, percent
from mimkernels.engine.figures import as_colour, enlarged, png_address

_WRONG = (0.85, 0.1, 0.1)


class _Classes(Task[SegmentationScores]):
    """What both ways to read classes share: scores, and pictures in one table."""

    targets = ("labels",)
    picture_title = "Segmentation"
    reader: str  # in the names of rows of pictures

    def worth(self, scores: SegmentationScores) -> float:
        return scores.miou

    def picture_text(self, data: DenseData, shown: DenseImages) -> str:
        return "Classes by colour; wrong pixels in red."

    def legend(self, data: DenseData) -> list[tuple[str, str]]:
        return [(name, _colour(number)) for number, name in enumerate(data.classes)]

    def true_rows(self, data: DenseData, shown: DenseImages) -> list[PictureRow]:
        return [("labels", _labelled(shown.images, shown.target("labels")))]

    def read_rows(self, data: DenseData, shown: DenseImages, label: str, predictions: Tensor) -> list[PictureRow]:
        return [
            (f"{label}: {self.reader}", _labelled(shown.images, predictions)),
            ("wrong pixels", _wrong(shown.images, predictions, shown.target("labels"))),
        ]

    def _scored(self, job: Job, predicted: Tensor, losses: list[float]) -> Reading[SegmentationScores]:
        counts = confusion(predicted, job.test.truth.target("labels"), len(job.data.classes))
        return Reading(segmentation_scores(counts), predicted, losses)


class Segmentation(_Classes):
    """Channels dropped, normalised, and one linear layer."""

    name = "segmentation"
    explanation = (
        "Segmentation over all pixels of the test images together: mIoU is the mean of the classes' intersections over "
        "unions, aAcc the share of right pixels, mAcc its mean over classes."
    )
    columns = ("mIoU", "aAcc", "mAcc")
    curves = {"mIoU, %": lambda scores: 100 * scores.miou}  # noqa: RUF012
    reader = "linear"

    def read(self, job: Job) -> Reading[SegmentationScores]:
        config, labels = job.config, job.train.truth.target("labels")
        head = LinearSegmentation(job.channels, len(job.data.classes), config.dropout)
        losses = train(head, job.train.maps, labels, config, config.weight_decay, job.device, job.what)
        return self._scored(job, predict(head.eval().predict, job.test.maps, job.size, job.device), losses)

    def summary(self, scores: SegmentationScores) -> str:
        return f"mIoU {100 * scores.miou:.1f} %"

    def cells(self, scores: SegmentationScores) -> list[str]:
        return percent(scores[:3])

    def sections(self, data: DenseData, scores: Mapping[str, SegmentationScores]) -> list[ChartSection]:
        bars = {label: [100 * iou for iou in each.iou] for label, each in scores.items()}
        text = "Of every model, the layers that are best at segmentation."
        return [ChartSection("Class by class", text, bar_chart(data.classes, bars, "IoU, %", 100))]


class NearestSegmentation(_Classes):
    """The most similar patches of the training images vote."""

    name = "knn"
    explanation = "k-NN: the most similar patches of the training images vote; nothing is trained."
    columns = ("k-NN mIoU",)
    curves = {"mIoU of the nearest patches, %": lambda scores: 100 * scores.miou}  # noqa: RUF012
    reader = "nearest patches"

    def read(self, job: Job) -> Reading[SegmentationScores]:
        config, labels = job.config, job.train.truth.target("labels")
        nearest = NearestPatches(
            job.train.maps, labels, len(job.data.classes), config.neighbours, config.seed, job.device
        )
        return self._scored(job, predict(nearest.predict, job.test.maps, job.size, job.device), [])

    def summary(self, scores: SegmentationScores) -> str:
        return f"mIoU of k-NN {100 * scores.miou:.1f} %"

    def cells(self, scores: SegmentationScores) -> list[str]:
        return percent([scores.miou])


def _colour(number: int) -> str:
    return SERIES[number % len(SERIES)]


def _labelled(images: Tensor, labels: Tensor) -> list[str]:
    """Images in grey under the colours of their pixels' classes."""
    import matplotlib

    palette = torch.tensor([matplotlib.colors.to_rgb(_colour(number)) for number in range(256)])
    made = []
    for image, numbers in zip(map(as_colour, images), labels.long(), strict=True):
        colours = palette[numbers].permute(2, 0, 1)
        mixed = 0.35 * image.mean(0, keepdim=True) + 0.65 * colours
        made.append(png_address(enlarged(torch.where(numbers == IGNORED, image, mixed))))
    return made


def _wrong(images: Tensor, predicted: Tensor, labels: Tensor) -> list[str]:
    red = torch.tensor(_WRONG).view(3, 1, 1)
    made = []
    for image, got, wanted in zip(map(as_colour, images), predicted, labels, strict=True):
        wrong = (got != wanted) & (wanted != IGNORED)
        made.append(png_address(enlarged(torch.where(wrong, red, 0.6 * image.mean(0, keepdim=True) + 0.3))))
    return made
