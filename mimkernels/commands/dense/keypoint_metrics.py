"""What predictions of joints are worth: PCK, and average precision by object keypoint similarity."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# As numpy makes them, to the last bit those of COCO's own evaluation.
THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())  # of the similarity
_RECALLS = torch.from_numpy(np.linspace(0, 1, 101))  # at which precisions are averaged


class KeypointScores(NamedTuple):
    """Of the labelled joints of all images, hidden ones too.

    Attributes:
        pck_10, pck_20: share of joints that are off by less than 0.1 and 0.2 of the larger side of the person's box.
        ap: mean of the average precisions at similarities of 0.50, 0.55, ... 0.95.
        ap_50, ap_75: average precisions at similarities of 0.5 and 0.75.
        joint_pck_10, joint_pck_20: of each joint; NaN where no image has it labelled.
    """

    pck_10: float
    pck_20: float
    ap: float
    ap_50: float
    ap_75: float
    joint_pck_10: list[float]
    joint_pck_20: list[float]


def keypoint_scores(
    predicted: Tensor, joints: Tensor, boxes: Tensor, areas: Tensor, sigmas: Sequence[float]
) -> KeypointScores:
    """Scores of one prediction for the one person of each image.

    Args:
        predicted: ``[n, K, 3]`` x, y and confidence; their mean over the joints ranks the images.
        joints: ``[n, K, 3]`` x, y and flag: 0 where a joint is not labelled. Persons without any joint do not count.
        boxes: ``[n, 4]`` left, top, width, height.
        areas: ``[n]`` pixels of the person.
        sigmas: ``[K]`` deviations of labels, over the root of the area.
    """
    labelled = joints[..., 2] > 0
    errors = _distances(predicted, joints) / boxes[:, 2:].double().amax(1)[:, None]
    right_10, right_20 = ((errors < share) & labelled for share in (0.1, 0.2))
    total = labelled.sum().double()
    kept = labelled.any(1)
    similarity = keypoint_similarity(predicted, joints, areas, sigmas)[kept]
    confidence = predicted[..., 2].double().mean(1)[kept]
    precisions = [average_precision(similarity, confidence, threshold) for threshold in THRESHOLDS]
    return KeypointScores(
        float(right_10.sum() / total),
        float(right_20.sum() / total),
        sum(precisions) / len(precisions),
        precisions[0],
        precisions[5],
        (right_10.sum(0) / labelled.sum(0)).tolist(),
        (right_20.sum(0) / labelled.sum(0)).tolist(),
    )


def keypoint_similarity(predicted: Tensor, joints: Tensor, areas: Tensor, sigmas: Sequence[float]) -> Tensor:
    """``[n]`` fp64: the mean over the labelled joints of ``exp(-d^2 / (2 area (2 sigma)^2))`` (COCO's OKS); NaN where
    there is none."""
    labelled = joints[..., 2] > 0
    widths = areas.double()[:, None] * (2 * torch.tensor(sigmas, dtype=torch.float64)).square()
    closeness = (-_distances(predicted, joints).square() / (2 * widths.clamp(min=1e-12))).exp()
    return (closeness * labelled).sum(1) / labelled.sum(1)


def average_precision(similarity: Tensor, confidence: Tensor, threshold: float) -> float:
    """COCO's: the mean over 101 recalls of the highest precision at this recall or a higher one.

    Args:
        similarity: ``[n]``, one prediction for each of n persons; it finds its person from `threshold` on.
        confidence: ``[n]``, by which predictions are taken in, the highest first; equal ones by their order.
    """
    if not len(similarity):
        return float("nan")
    found = (similarity >= threshold)[confidence.argsort(descending=True, stable=True)].double()
    hits = found.cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    places = torch.searchsorted(hits / len(hits), _RECALLS)
    return float(torch.cat([envelope, torch.zeros(1, dtype=torch.float64)])[places].mean())


def _distances(predicted: Tensor, joints: Tensor) -> Tensor:
    """``[n, K]`` fp64."""
    return (predicted[..., :2].double() - joints[..., :2].double()).square().sum(-1).sqrt()
