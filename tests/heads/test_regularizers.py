import math

import pytest
import torch

from mimkernels import attention
from mimkernels.heads import parse_regularizers, patch_grid_positions, regularization_loss


def test_terms_become_weights():
    weights = {"entropy": 1e-3, "distance": -1e-4}
    assert parse_regularizers(["entropy=1e-3", "distance=-1e-4"]) == weights
    assert parse_regularizers("entropy = 1e-3, distance=-1e-4") == weights
    assert parse_regularizers([]) == {}


@pytest.mark.parametrize(
    ("terms", "told"),
    [
        (["entropy"], "must be name=weight"),
        (["entropi=1"], "unknown regulariser 'entropi'; known: entropy, prefix_mass"),
        (["peak=1"], "'peak' has no gradient"),
        (["entropy=much"], "'much' is not a number"),
        (["entropy=inf"], "must be finite"),
        (["entropy=1", "entropy=2"], "given twice"),
    ],
)
def test_bad_terms_are_refused(terms, told):
    with pytest.raises(ValueError, match=told):
        parse_regularizers(terms)


def captured(q, weights):
    return attention(
        q, q, q, num_prefix=1, positions=patch_grid_positions(2), stats=tuple(weights), backend="reference"
    ).stats


def test_loss_is_the_weighted_mean_over_layers_images_heads_and_patch_queries():
    weights = parse_regularizers(["entropy=0.5", "distance=-2"])
    q = torch.randn(2, 3, 2, 5, 8)  # two layers
    layers = [captured(x, weights) for x in q]
    expected = sum(
        weight * torch.stack([layer[name][..., 1:] for layer in layers]).mean() for name, weight in weights.items()
    )
    torch.testing.assert_close(regularization_loss(weights, layers, num_prefix=1), expected)
    torch.testing.assert_close(
        regularization_loss(weights, layers[0], num_prefix=1), regularization_loss(weights, layers[:1], num_prefix=1)
    )


@pytest.mark.parametrize(("sign", "moves"), [(1.0, -1), (-1.0, 1)])
def test_a_positive_weight_lowers_the_statistic_and_a_negative_one_raises_it(sign, moves):
    q = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = {"entropy": sign}
    before = regularization_loss(weights, captured(q, weights), num_prefix=1)
    (grad,) = torch.autograd.grad(before, q)
    after = regularization_loss(weights, captured(q - 0.1 * grad, weights), num_prefix=1)
    assert math.copysign(1, (after - before).item() * sign) == moves


def test_missing_statistics_are_named():
    with pytest.raises(ValueError, match="needs distance, captured: entropy"):
        regularization_loss({"distance": 1.0}, {"entropy": torch.ones(1, 1, 3)})
    with pytest.raises(ValueError, match="at least one layer"):
        regularization_loss({"distance": 1.0}, [])
    assert regularization_loss({}, {"entropy": torch.ones(1, 1, 3)}) == 0
