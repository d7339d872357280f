"""What predictions of labels and depths are worth."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from mimkernels.data.pixel_targets import IGNORED


class SegmentationScores(NamedTuple):
    """Of a whole data set: intersections and unions are summed over all its pixels first.

    Attributes:
        miou: mean of ``iou`` over the classes that occur or are predicted.
        accuracy: share of pixels that are right.
        class_accuracy: mean over the classes that occur of the share of their pixels that are right.
        iou: intersection over union of every class; NaN where a class neither occurs nor is predicted.
    """

    miou: float
    accuracy: float
    class_accuracy: float
    iou: list[float]


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """``[classes, classes]`` int64: pixels by label and prediction, without ignored ones."""
    counted = labels != IGNORED
    pairs = labels[counted].long() * classes + predicted[counted].long()
    return torch.bincount(pairs.flatten(), minlength=classes * classes).view(classes, classes)


def segmentation_scores(counts: Tensor) -> SegmentationScores:
    """Scores of a confusion matrix ``[label, prediction]``."""
    right, labelled = counts.diag().double(), counts.sum(1).double()
    iou = right / (labelled + counts.sum(0) - right)
    return SegmentationScores(
        float(iou.nanmean()), float(right.sum() / labelled.sum()), float((right / labelled).nanmean()), iou.tolist()
    )


class DepthScores(NamedTuple):
    """Errors of depths, of each image over its valid pixels, then averaged over the images.

    Attributes:
        rmse, rmse_log: root of the mean squared error of depths, and of their logarithms.
        abs_rel, sq_rel: error and its square, over the true depth.
        log10: error of the decimal logarithms.
        silog: 100 times the deviation of the logarithms' error, which a factor on all depths does not change.
        d1, d2, d3: share of pixels off by a factor of less than 1.25, its square and its cube.
    """

    rmse: float
    abs_rel: float
    d1: float
    d2: float
    d3: float
    sq_rel: float
    rmse_log: float
    log10: float
    silog: float


def valid_depths(depths: Tensor, low: float, high: float) -> Tensor:
    """Which depths count: those between the two."""
    return (depths > low) & (depths < high)


def depth_scores(pairs: Iterable[tuple[Tensor, Tensor]], low: float, high: float) -> DepthScores:
    """Scores of predictions and depths ``[H, W]``, a pair per image.

    A pixel is valid where ``low < depth < high``, an image if it has one.
    """
    rows = []
    for p, g in ((p.double(), g.double()) for p, g in pairs):
        valid = valid_depths(g, low, high)
        p, g = p[valid].clamp(min=1e-6), g[valid]
        if not len(g):
            continue
        error, logs, ratio = p - g, p.log() - g.log(), torch.maximum(p / g, g / p)
        rows.append(
            torch.stack(
                [
                    error.square().mean().sqrt(),
                    (error.abs() / g).mean(),
                    *((ratio < 1.25**power).double().mean() for power in (1, 2, 3)),
                    (error.square() / g).mean(),
                    logs.square().mean().sqrt(),
                    (p.log10() - g.log10()).abs().mean(),
                    100 * logs.var(correction=0).sqrt(),
                ]
            )
        )
    means = torch.stack(rows).mean(0) if rows else torch.full((len(DepthScores._fields),), torch.nan)
    return DepthScores(*means.tolist())
