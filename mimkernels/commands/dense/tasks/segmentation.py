"""Classes of pixels, by a linear layer and by the nearest patches."""

from collections.abc import Mapping

import torch
from markupsafe import Markup
from torch import Tensor

from mimkernels._palette import SERIES
from mimkernels.commands.dense.charts import bar_chart
from mimkernels.commands.dense.data import DenseData, DenseImages
from mimkernels.commands.dense.heads import LinearSegmentation, NearestPatches, Reader, train
from mimkernels.commands.dense.metrics import SegmentationScores, confusion, segmentation_scores
from mimkernels.commands.dense.tasks.base import ChartSection, Job, PictureRow, Reading, Task, percent
from mimkernels.data.pixel_targets import IGNORED
from mimkernels.engine.figures import as_colour, enlarged, png_address

_WRONG = (0.85, 0.1, 0.1)
_MOST_CLASSES, _IN_A_CHART = 30, 10  # that are named and drawn one by one


class _Classes(Task[SegmentationScores]):
    """What both ways to read classes share: scores, and pictures in one table."""

    targets = ("labels",)
    picture_title = "Segmentation"
    reader: str  # in the names of rows of pictures

    def check_loaded(self, data: DenseData) -> None:
        if not (data.train.target("labels") != IGNORED).any():
            raise ValueError(f"no pixel of the {data.content} to learn from has a label")

    def worth(self, scores: SegmentationScores) -> float:
        return scores.miou

    def picture_text(self, data: DenseData, shown: DenseImages) -> str:
        more = len(data.classes) - _MOST_CLASSES
        told = f" The first {_MOST_CLASSES} of {len(data.classes)} classes:" if more > 0 else ""
        return f"Classes by colour; wrong pixels in red.{told}"

    def legend(self, data: DenseData) -> list[tuple[str, str]]:
        return [(name, _colour(number)) for number, name in enumerate(data.classes[:_MOST_CLASSES])]

    def true_rows(self, data: DenseData, shown: DenseImages) -> list[PictureRow]:
        return [("labels", _labelled(shown.images, shown.target("labels")))]

    def read_rows(self, data: DenseData, shown: DenseImages, label: str, predictions: Tensor) -> list[PictureRow]:
        return [
            (f"{label}: {self.reader}", _labelled(shown.images, predictions)),
            ("wrong pixels", _wrong(shown.images, predictions, shown.target("labels"))),
        ]

    def _scored(self, job: Job, reader: Reader, losses: list[float]) -> Reading[SegmentationScores]:
        shown, pairs = job.predictions(reader, "labels")
        classes = len(job.data.classes)
        counts = torch.zeros(classes, classes, dtype=torch.int64)
        for predicted, labels in pairs:
            counts += confusion(predicted, labels, classes)
        return Reading(segmentation_scores(counts), shown, losses)


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
        return self._scored(job, head.eval(), losses)

    def summary(self, scores: SegmentationScores) -> str:
        return f"mIoU {percent(scores.miou)}"

    def cells(self, scores: SegmentationScores) -> list[str]:
        return [percent(score) for score in scores[:3]]

    def sections(self, data: DenseData, scores: Mapping[str, SegmentationScores]) -> list[ChartSection]:
        shown = data.classes[:_MOST_CLASSES]
        charts = []
        for start in range(0, len(shown), _IN_A_CHART):
            part = slice(start, start + _IN_A_CHART)
            bars = {label: [100 * iou for iou in each.iou[part]] for label, each in scores.items()}
            charts.append(bar_chart(shown[part], bars, "IoU, %", 100))
        text = "Of every model, the layers that are best at segmentation."
        if len(shown) < len(data.classes):
            text += f" The first {len(shown)} of {len(data.classes)} classes; numbers.json has all."
        return [ChartSection("Class by class", text, Markup("").join(charts))]


class NearestSegmentation(_Classes):
    """The most similar patches of the training images vote."""

    name = "knn"
    explanation = "k-NN: the most similar patches of the training images vote; nothing is trained."
    columns = ("k-NN mIoU",)
    curves = {"k-NN mIoU, %": lambda scores: 100 * scores.miou}  # noqa: RUF012
    reader = "nearest patches"

    def read(self, job: Job) -> Reading[SegmentationScores]:
        config, labels = job.config, job.train.truth.target("labels")
        nearest = NearestPatches(
            job.train.maps, labels, len(job.data.classes), config.neighbours, config.seed, job.device
        )
        return self._scored(job, nearest, [])

    def summary(self, scores: SegmentationScores) -> str:
        return f"mIoU of k-NN {percent(scores.miou)}"

    def cells(self, scores: SegmentationScores) -> list[str]:
        return [percent(scores.miou)]


def _colour(number: int) -> str:
    """Of many classes, hues at steps of the golden angle, which stay apart longest."""
    if number < len(SERIES):
        return SERIES[number]
    import matplotlib

    hue, light = number * 0.618034 % 1, (1.0, 0.75, 0.5)[number % 3]
    red, green, blue = matplotlib.colors.hsv_to_rgb((hue, 0.75, light)).tolist()
    return matplotlib.colors.to_hex((red, green, blue))


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
