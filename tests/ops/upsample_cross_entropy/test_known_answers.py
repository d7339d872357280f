"""upsample_cross_entropy against its definition."""

import math

from tests.known_answers import assert_the_reference_is


def taps(place, size, target):
    """The two places between which the centre of a pixel lies, and the weight of the second one."""
    at = max(0.0, (place + 0.5) * size / target - 0.5)
    first = min(int(at), size - 1)
    return first, min(first + 1, size - 1), at - first


def definition(logits, labels, weight, label_smoothing, ignore_index):
    classes = len(weight)
    losses, weights = [], []
    for planes, rows in zip(logits, labels, strict=True):
        for y, row in enumerate(rows):
            top, bottom, down = taps(y, len(planes[0]), len(rows))
            for x, label in enumerate(row):
                if label == ignore_index:
                    continue
                left, right, along = taps(x, len(planes[0][0]), len(row))
                z = [
                    (1 - down) * ((1 - along) * plane[top][left] + along * plane[top][right])
                    + down * ((1 - along) * plane[bottom][left] + along * plane[bottom][right])
                    for plane in planes
                ]
                lse = math.log(math.fsum(math.exp(value) for value in z))
                spread = math.fsum(w * (lse - value) for w, value in zip(weight, z, strict=True)) / classes
                hard = weight[label] * (lse - z[label])
                losses.append((1 - label_smoothing) * hard + label_smoothing * spread)
                weights.append(weight[label])
    return {"output": math.fsum(losses) / math.fsum(weights)}


def test_the_reference_in_fp64_is_the_definition():
    assert_the_reference_is(definition, "upsample_cross_entropy")
