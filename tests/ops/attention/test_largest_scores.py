"""max_score and argmax: the largest score of a row and the first key that has it, known without an oracle."""

import math

import pytest
import torch

from mimkernels import attention, attention_qkvpacked
from mimkernels.testing import DEVICE
from tests.ops.attention.test_large_scores import every_backend, randn, zeros

STATS = ("max_score", "argmax")
# One block of keys, and several, on every backend.
every_length = pytest.mark.parametrize("keys", [70, 600])


def made_of_bias(bias, backend, **options):
    """Attention whose scores are the bias ``[Nq, Nk]`` alone."""
    q, k = zeros(1, 1, bias.shape[0], 8), randn(1, 1, bias.shape[1], 8)
    stats = attention(q, k, k, bias=bias[None].to(DEVICE), stats=STATS, backend=backend, **options).stats
    return stats["max_score"][0, 0].tolist(), stats["argmax"][0, 0].tolist()


@every_length
@every_backend
def test_each_query_finds_the_key_that_was_made_for_it(backend, keys):
    wanted = torch.randperm(keys, generator=torch.Generator().manual_seed(3))[:20].to(DEVICE)
    k = torch.nn.functional.normalize(randn(2, 2, keys, 16), dim=-1)
    q = k[:, :, wanted] * 3.0
    made = attention(q, k, k, scale=2.0, num_prefix=1, stats=STATS, backend=backend)
    assert made.stats["argmax"].dtype == torch.int64
    assert made.stats["max_score"].dtype == torch.float32
    assert torch.equal(made.stats["argmax"], wanted.expand(2, 2, 20))
    torch.testing.assert_close(made.stats["max_score"], torch.full((2, 2, 20), 6.0, device=DEVICE))


@every_backend
def test_a_negative_scale_turns_the_order_of_keys(backend):
    k = zeros(1, 1, 40, 8)
    k[0, 0, :, 0] = torch.arange(40) - 7.0
    made = attention(torch.ones_like(k[:, :, :3]), k, k, scale=-2.0, stats=STATS, backend=backend)
    assert made.stats["argmax"].eq(0).all()
    assert made.stats["max_score"].eq(14.0).all()


@every_length
@every_backend
def test_of_equal_scores_the_first_counts(backend, keys):
    q, k = zeros(1, 1, 5, 8) + 1.0, randn(1, 1, keys, 8)
    k[:, :, [keys - 1, 61, 17, 40]] = 9.0
    made = attention(q, k, k, num_prefix=20, stats=STATS, backend=backend).stats
    assert made["argmax"].eq(17).all()
    mask = torch.ones(1, keys, dtype=torch.bool, device=DEVICE)
    mask[0, :30] = False
    assert attention(q, k, k, key_mask=mask, stats=STATS, backend=backend).stats["argmax"].eq(40).all()
    assert attention(q * 0, k, k, stats=STATS, backend=backend).stats["argmax"].eq(0).all()
    assert attention(q, k, k, scale=0.0, key_mask=mask, stats=STATS, backend=backend).stats["argmax"].eq(30).all()


@every_backend
def test_biases_and_masks_count_and_rows_without_a_key_have_none(backend):
    bias = torch.full((4, 70), -5.0)
    bias[0, 66], bias[1, 2], bias[1, 65] = 3.0, 2.0, 2.0
    bias[2] = -math.inf
    mask = torch.ones(1, 70, dtype=torch.bool, device=DEVICE)
    assert made_of_bias(bias, backend) == ([3.0, 2.0, -math.inf, -5.0], [66, 2, -1, 0])
    mask[0, 2], mask[0, 66] = False, False
    assert made_of_bias(bias, backend, key_mask=mask) == ([-5.0, 2.0, -math.inf, -5.0], [0, 65, -1, 0])
    assert made_of_bias(bias, backend, key_mask=mask & False) == ([-math.inf] * 4, [-1] * 4)
    assert made_of_bias(bias[:, :0], backend) == ([-math.inf] * 4, [-1] * 4)
    # Of finite masks, a key that is hidden only so far.
    bias[2] = -1e9
    assert made_of_bias(bias, backend) == ([3.0, 2.0, -1e9, -5.0], [66, 2, 0, 0])


@every_backend
def test_nan_has_no_largest_score_and_infinity_is_one(backend):
    bias = torch.zeros(4, 70)
    bias[1, 33], bias[2, 44], bias[2, 60], bias[3, 5] = math.nan, math.inf, math.inf, 1.0
    score, key = made_of_bias(bias, backend)
    assert math.isnan(score[1])
    assert [score[0], *score[2:]] == [0.0, math.inf, 1.0]
    assert key == [0, -1, 44, 5]


@every_backend
def test_the_largest_score_is_that_of_the_largest_weight(backend):
    q, k = randn(2, 2, 21, 16), randn(2, 2, 90, 16, seed=1)
    logit_scale = torch.tensor([1.0, 3.0], device=DEVICE)
    for options in ({}, {"logit_scale": logit_scale}):
        made = attention(q, k, k, stats=("peak", *STATS), backend=backend, **options)
        torch.testing.assert_close((made.stats["max_score"] - made.lse).exp(), made.stats["peak"])
        alone = attention(q, k, k, stats=("argmax",), backend=backend, **options)
        assert torch.equal(alone.stats["argmax"], made.stats["argmax"])
        assert torch.equal(alone.out, made.out)


@every_backend
def test_they_carry_no_gradient_and_change_none(backend):
    x = randn(1, 2, 9, 8).requires_grad_()

    def gradient(*more):
        made = attention(x, x, x, stats=("entropy", *more), backend=backend)
        assert not any(made.stats[name].requires_grad for name in more)
        return torch.autograd.grad(made.out.sum() + made.stats["entropy"].sum(), x)[0]

    assert torch.equal(gradient(*STATS), gradient())
    made = attention(x, x, x, stats=STATS, backend=backend)
    (made.out.sum() + made.stats["max_score"].sum()).backward()
    packed = attention_qkvpacked(randn(1, 9, 3, 2, 8).requires_grad_(), stats=STATS, backend=backend)
    assert not any(value.requires_grad for value in packed.stats.values())


def test_more_keys_than_fp32_can_number_are_refused():
    q = zeros(1, 1, 1, 8)
    k = q.expand(1, 1, 2**24 + 1, 8)
    with pytest.raises(ValueError, match="argmax is of at most 16777216 keys, got 16777217"):
        attention(q, k, k, stats=("argmax",))
