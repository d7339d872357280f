"""Metrics of `mimkernels dense` equal those of torchmetrics and scikit-learn, where these have them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import mean_absolute_percentage_error, root_mean_squared_error
from sklearn.neighbors import KNeighborsClassifier

from mimkernels.commands.dense.heads import NearestPatches
from mimkernels.commands.dense.metrics import IGNORED, confusion, depth_scores, segmentation_scores


@pytest.fixture(scope="module")
def torchmetrics():
    """Imported when a test runs: it takes seconds."""
    import torchmetrics
    import torchmetrics.classification
    import torchmetrics.regression
    import torchmetrics.segmentation

    return torchmetrics


def labelled(classes, present, seed=0):
    """Predictions and labels of three batches of images, a sixth of the pixels ignored, of the classes `present`."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(3):
        labels = torch.tensor(present)[torch.randint(len(present), (4, 9, 7), generator=generator)]
        predicted = torch.where(
            torch.rand(labels.shape, generator=generator) < 0.5,
            labels,
            torch.tensor(present)[torch.randint(len(present), labels.shape, generator=generator)],
        )
        labels[torch.rand(labels.shape, generator=generator) < 1 / 6] = IGNORED
        batches.append((predicted.to(torch.uint8), labels.to(torch.uint8)))
    return batches


@pytest.mark.parametrize("present", [[0, 1, 2, 3, 4], [0, 2, 3]])
def test_segmentation_of_a_data_set_with_ignored_pixels(present, torchmetrics):
    classes, batches = 5, labelled(5, present)
    predicted, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    counts = confusion(predicted, labels, classes)
    scores = segmentation_scores(counts)
    assert (labels == IGNORED).float().mean() > 0.1

    multiclass = torchmetrics.classification

    def of_torchmetrics(metric):  # of one batch after the other: sums over the data set come first
        for predicted, labels in batches:
            metric.update(predicted.long(), labels.long())
        return metric.compute()

    common = {"num_classes": classes, "ignore_index": IGNORED}
    assert torch.equal(counts, of_torchmetrics(multiclass.MulticlassConfusionMatrix(**common)))
    assert scores.miou == pytest.approx(float(of_torchmetrics(multiclass.MulticlassJaccardIndex(**common))))
    each = of_torchmetrics(multiclass.MulticlassJaccardIndex(**common, average="none"))
    assert [scores.iou[number] for number in present] == pytest.approx(each[present].tolist())
    assert scores.accuracy == pytest.approx(
        float(of_torchmetrics(multiclass.MulticlassAccuracy(**common, average="micro")))
    )
    assert scores.class_accuracy == pytest.approx(
        float(of_torchmetrics(multiclass.MulticlassAccuracy(**common, average="macro")))
    )


def test_mean_iou_of_one_image(torchmetrics):
    """torchmetrics' MeanIoU averages over images: of one image it is that of the data set."""
    ((predicted, labels), *_) = labelled(4, [0, 1, 2, 3])
    predicted, labels = predicted[:1].long(), labels[:1].long().masked_fill(labels[:1] == IGNORED, 0)
    metric = torchmetrics.segmentation.MeanIoU(num_classes=4, input_format="index")
    metric.update(predicted, labels)
    assert segmentation_scores(confusion(predicted, labels, 4)).miou == pytest.approx(float(metric.compute()))


def test_depth_image_by_image(torchmetrics):
    generator = torch.Generator().manual_seed(0)
    depths = 0.2 + 11 * torch.rand(5, 8, 9, generator=generator, dtype=torch.float64)
    predicted = depths * (0.7 + 0.6 * torch.rand(5, 8, 9, generator=generator, dtype=torch.float64))
    scores = depth_scores(zip(predicted, depths, strict=True), 0.5, 10.0)
    valid = (depths > 0.5) & (depths < 10.0)
    assert 0.02 < (~valid).float().mean() < 0.5
    pairs = [(p[v], g[v]) for p, g, v in zip(predicted, depths, valid, strict=True)]

    def mean(score):
        return float(torch.stack([torch.as_tensor(score(p, g)) for p, g in pairs]).double().mean())

    assert scores.rmse == pytest.approx(mean(torchmetrics.regression.MeanSquaredError(squared=False).to(torch.float64)))
    assert scores.rmse == pytest.approx(mean(lambda p, g: root_mean_squared_error(g, p)))
    assert scores.abs_rel == pytest.approx(mean(torchmetrics.regression.MeanAbsolutePercentageError()))
    assert scores.abs_rel == pytest.approx(mean(lambda p, g: mean_absolute_percentage_error(g, p)))
    # torchmetrics takes logarithms of 1 + x, and its squares are not rooted.
    log_error = torchmetrics.regression.MeanSquaredLogError()
    assert scores.rmse_log == pytest.approx(mean(lambda p, g: log_error(p - 1, g - 1).sqrt()), rel=1e-6)
    for power, share in ((1, scores.d1), (2, scores.d2), (3, scores.d3)):
        bound = 1.25**power  # the ratio lies between its inverse and it
        assert share == pytest.approx(mean(lambda p, g, b=bound: ((p < b * g) & (p > g / b)).double().mean()))


def test_nearest_patches_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (10, 4, 4), generator=generator)
    maps = F.one_hot(labels, 3).permute(0, 3, 1, 2) + torch.randn(10, 3, 4, 4, generator=generator)
    nearest = NearestPatches([maps[:8]], labels[:8], 3, 5, 0, torch.device("cpu"))
    patches = maps.movedim(1, -1).reshape(10, 16, 3)
    theirs = KNeighborsClassifier(5, metric="cosine", weights=lambda distance: np.exp(-distance / 0.07))
    theirs.fit(patches[:8].reshape(-1, 3), labels[:8].flatten())
    expected = torch.from_numpy(theirs.predict(patches[8:].reshape(-1, 3))).view(2, 4, 4)
    assert torch.equal(nearest.predict(maps[8:], (4, 4)).long(), expected)
