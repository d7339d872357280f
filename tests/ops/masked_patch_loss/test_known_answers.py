"""masked_patch_loss against its definition."""

import math

from tests.known_answers import assert_the_reference_is, patches


def definition(pred, images, ids, patch_size, mean, std, norm_pix):
    assert norm_pix
    losses = []
    for image, rows, kept in zip(images, pred, ids, strict=True):
        cut = patches(image, patch_size, mean, std)
        for predicted, i in zip(rows, kept, strict=True):
            pixels = [[row[x] for row in channel for x in range(patch_size)] for channel in cut[i]]
            target = [value for pixel in zip(*pixels, strict=True) for value in pixel]  # channels last
            middle = math.fsum(target) / len(target)
            variance = math.fsum((t - middle) ** 2 for t in target) / (len(target) - 1)
            target = [(t - middle) / math.sqrt(variance + 1e-6) for t in target]
            squares = [(a - b) ** 2 for a, b in zip(predicted, target, strict=True)]
            losses.append(math.fsum(squares) / len(squares))
    return {"output": math.fsum(losses) / len(losses)}


def test_the_reference_in_fp64_is_the_definition():
    assert_the_reference_is(definition, "masked_patch_loss")
