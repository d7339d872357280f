"""masked_feature_loss against its definition."""

import math

from tests.known_answers import assert_the_reference_is


def definition(pred, target, ids, beta):
    losses = []
    for rows, tokens, kept in zip(pred, target, ids, strict=True):
        for row, i in zip(rows, kept, strict=True):
            middle = math.fsum(tokens[i]) / len(row)
            variance = math.fsum((t - middle) ** 2 for t in tokens[i]) / len(row)
            normal = [(t - middle) / math.sqrt(variance + 1e-5) for t in tokens[i]]
            sizes = [abs(p - t) for p, t in zip(row, normal, strict=True)]
            parts = [d * d / (2 * beta) if d < beta else d - beta / 2 for d in sizes]
            losses.append(math.fsum(parts) / len(row))
    return {"output": math.fsum(losses) / len(losses)}


def test_the_reference_in_fp64_is_the_definition():
    assert_the_reference_is(definition, "masked_feature_loss")
