"""Known answers of query_pool, weighted_pool and reduce_pool, on every backend that runs here."""

import pytest
import torch
from torch.nn import functional as F

import mimkernels as mk
from mimkernels.ops._registry import BACKENDS
from mimkernels.testing import DEVICE

HERE = [name for name, backend in BACKENDS.items() if backend.runs_on(DEVICE, named=True)]
NAN = float("nan")


@pytest.fixture(params=HERE)
def backend(request):
    return request.param


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_query_of_zeros_pools_the_mean(backend):
    x = tokens(3, 13, 20)
    out, weights = mk.query_pool(x, torch.zeros(2, 20, device=DEVICE), return_weights=True, backend=backend)
    close(out, x.mean(1, keepdim=True).expand(-1, 2, -1))
    close(weights, torch.full((3, 2, 13), 1 / 13, device=DEVICE))


@pytest.mark.parametrize("op", ["query_pool", "weighted_pool"])
def test_return_weights_is_true_or_false(op):
    x = tokens(3, 13, 20)
    other = {"query_pool": torch.zeros(2, 20), "weighted_pool": torch.zeros(3, 13)}[op].to(DEVICE)
    for value, shown in (("x", "'x'"), (1, "1"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"^{op}: return_weights must be a bool, got {shown}$"):
            getattr(mk, op)(x, other, return_weights=value)


def test_a_strong_query_picks_its_token(backend):
    x = torch.eye(7, device=DEVICE).expand(2, 7, 7)
    out, weights = mk.query_pool(x, 1000 * torch.eye(7, device=DEVICE), scale=1.0, return_weights=True, backend=backend)
    assert torch.equal(out, x)
    assert torch.equal(weights, x)


def test_one_query_is_abmilp_of_depth_one(backend):
    x, layer = tokens(2, 11, 16), torch.nn.Linear(16, 1, device=DEVICE)
    expected = (layer(x).softmax(1) * x).sum(1, keepdim=True)
    close(mk.query_pool(x, layer.weight, scale=1.0, backend=backend), expected)


def test_the_scale_is_that_of_attention(backend):
    x, queries, values = tokens(2, 11, 16), tokens(3, 16, seed=1), tokens(2, 11, 24, seed=2)
    expected = F.scaled_dot_product_attention(queries.expand(2, 3, 16), x, values)
    close(mk.query_pool(x, queries, values=values, backend=backend), expected)


def test_each_query_pools_its_own_slice(backend):
    x, queries, values = tokens(2, 11, 16), tokens(4, 16, seed=1), tokens(2, 11, 24, seed=2)
    whole = mk.query_pool(x, queries, values=values, backend=backend)
    sliced = mk.query_pool(x, queries, values=values, sliced=True, backend=backend)
    for g in range(4):
        close(sliced[:, g], whole[:, g, 6 * g : 6 * g + 6])


def test_queries_of_each_image(backend):
    x, queries = tokens(3, 11, 16), tokens(3, 2, 16, seed=1)
    together = mk.query_pool(x, queries, backend=backend)
    for b in range(3):
        assert torch.equal(together[b : b + 1], mk.query_pool(x[b : b + 1], queries[b], backend=backend))


def pools(x, backend, **options):
    """Every op on the same tokens, with gradients."""
    x = x.clone().requires_grad_()
    made = [
        mk.query_pool(x, tokens(2, x.shape[2], seed=3), backend=backend, **options),
        mk.weighted_pool(x, tokens(*x.shape[:2], seed=4), backend=backend, **options),
        *(mk.reduce_pool(x, kind, backend=backend, **options) for kind in ("mean", "max", "gem")),
    ]
    return [(out.detach(), torch.autograd.grad(out.sum(), x)[0]) for out in made]


def test_prefix_tokens_are_as_if_they_were_not_there(backend):
    x = tokens(2, 12, 16)
    x[:, :3] = NAN
    weighted = mk.weighted_pool(x, tokens(2, 12), num_prefix=3, backend=backend)
    close(weighted, mk.weighted_pool(x[:, 3:], tokens(2, 12)[:, 3:], backend=backend))
    queries = tokens(2, 16)
    close(mk.query_pool(x, queries, num_prefix=3, backend=backend), mk.query_pool(x[:, 3:], queries, backend=backend))
    for kind in ("mean", "max", "gem"):
        close(mk.reduce_pool(x, kind, num_prefix=3, backend=backend), mk.reduce_pool(x[:, 3:], kind, backend=backend))


def test_a_mask_excludes_tokens_with_their_nan(backend):
    x, mask = tokens(2, 12, 16), torch.ones(2, 12, dtype=torch.bool, device=DEVICE)
    clean = pools(x, backend, mask=mask.clone().index_fill_(1, torch.tensor([1, 7], device=DEVICE), False))
    mask[:, 1] = mask[:, 7] = False
    x[:, 1], x[:, 7] = NAN, float("inf")
    for (out, grad), (expected, expected_grad) in zip(pools(x, backend, mask=mask), clean, strict=True):
        assert torch.equal(out, expected)
        assert torch.equal(grad, expected_grad)
        assert (grad[:, [1, 7]] == 0).all()


@pytest.mark.parametrize("queries", [16, 17, 33])
def test_many_strong_queries_pick_their_tokens(backend, queries):
    x = torch.eye(40, device=DEVICE, dtype=torch.bfloat16).expand(2, 40, 40)
    strong = 1024 * x[0, :queries]
    out, weights = mk.query_pool(x, strong, scale=1.0, return_weights=True, backend=backend)
    assert torch.equal(out, x[:, :queries])
    assert torch.equal(weights, x[:, :queries].float())


@pytest.mark.parametrize("queries", [16, 33])
def test_many_queries_look_at_no_masked_token(backend, queries):
    x, mask = tokens(2, 20, 40).bfloat16(), torch.ones(2, 20, dtype=torch.bool, device=DEVICE)
    masked = torch.tensor([0, 9, 17], device=DEVICE)
    mask[:, masked] = False
    q = tokens(queries, 40, seed=1).bfloat16().requires_grad_()

    def run(x):
        x = x.clone().requires_grad_()
        out, weights = mk.query_pool(x, q, mask=mask, return_weights=True, backend=backend)
        return out.detach(), weights.detach(), *torch.autograd.grad((out.float().square().sum(), weights.max()), (x, q))

    spoiled = x.clone()
    spoiled[:, masked[0]], spoiled[:, masked[1]], spoiled[:, masked[2]] = NAN, float("inf"), float("-inf")
    clean = run(x)
    assert all(torch.equal(a, b) for a, b in zip(run(spoiled), clean, strict=True))
    assert clean[1][..., masked].eq(0).all()
    assert clean[2][:, masked].eq(0).all()


def test_nan_of_one_of_many_queries_stays_with_it(backend):
    x, q = tokens(1, 20, 40).bfloat16(), tokens(18, 40, seed=1).bfloat16()
    mask = torch.arange(20, device=DEVICE)[None] < 15
    clean = mk.query_pool(x, q, mask=mask, backend=backend)
    q[3, 5] = NAN
    x.requires_grad_()
    out = mk.query_pool(x, q, mask=mask, backend=backend)
    others = torch.arange(18, device=DEVICE) != 3
    assert out[:, 3].isnan().all()
    assert torch.equal(out[:, others], clean[:, others])
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad[:, :15].isnan().all()
    assert grad[:, 15:].eq(0).all()


def test_an_image_without_allowed_tokens_gets_zeros(backend):
    x, mask = tokens(2, 12, 16), torch.ones(2, 12, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    x[1] = NAN
    for out, grad in pools(x, backend, mask=mask):
        assert out[0].ne(0).all()
        assert out[1].eq(0).all()
        assert grad[1].eq(0).all()


def test_scores_of_minus_infinity_weigh_nothing(backend):
    x, scores = tokens(2, 6, 16), torch.zeros(2, 6, device=DEVICE)
    scores[0, 1:] = float("-inf")
    scores[1] = float("-inf")
    out, weights = mk.weighted_pool(x, scores, return_weights=True, backend=backend)
    assert torch.equal(out, torch.stack([x[0, 0], torch.zeros(16, device=DEVICE)]))
    assert weights.sum().item() == 1.0


def test_a_nan_score_is_not_taken_for_nothing(backend):
    scores = torch.full((1, 6), NAN, device=DEVICE)
    assert mk.weighted_pool(tokens(1, 6, 16), scores, backend=backend).isnan().all()


def test_weights_as_given(backend):
    x, weights = tokens(2, 9, 16), tokens(2, 4, 9, seed=1)
    out, used = mk.weighted_pool(x, weights, normalize=False, return_weights=True, backend=backend)
    close(out, weights @ x)
    assert torch.equal(used, weights)


def test_scores_and_weights_keep_their_shape(backend):
    x, scores = tokens(2, 9, 16), tokens(2, 9, seed=1)
    out, weights = mk.weighted_pool(x, scores, return_weights=True, backend=backend)
    assert (out.shape, weights.shape) == ((2, 16), (2, 9))
    out, weights = mk.weighted_pool(x, scores[:, None], return_weights=True, backend=backend)
    assert (out.shape, weights.shape) == ((2, 1, 16), (2, 1, 9))


def test_gradients_of_the_weights_alone(backend):
    x, queries = tokens(2, 9, 16), tokens(3, 16, seed=1).requires_grad_()
    _, weights = mk.query_pool(x, queries, return_weights=True, backend=backend)
    (grad,) = torch.autograd.grad(weights.square().sum(), queries)
    plain = (queries @ x.transpose(1, 2) * 16**-0.5).softmax(-1)
    close(grad, torch.autograd.grad(plain.square().sum(), queries)[0])


def weights_of(op, x, values, scores, backend):
    """The weights of one row of scores, those of query_pool from tokens of one column."""
    if op == "weighted_pool":
        return mk.weighted_pool(values, scores, return_weights=True, backend=backend)[1]
    queries = torch.ones(1, 1, device=DEVICE)
    return mk.query_pool(x, queries, values=values, scale=1.0, return_weights=True, backend=backend)[1][:, 0]


@pytest.mark.parametrize("op", ["query_pool", "weighted_pool"])
def test_the_weights_alone_leave_no_gradient_in_what_is_pooled(op, backend):
    scores, values = tokens(2, 9), tokens(2, 9, 16, seed=1)
    scores[0, 3] = float("inf")  # all weights of that image are NaN
    values[1, 4, 5], values[1, 6, 7] = float("-inf"), NAN
    scores.requires_grad_(), values.requires_grad_()
    weights = weights_of(op, scores[..., None], values, scores, backend)
    upstream = tokens(2, 9, seed=2)
    grads = torch.autograd.grad(weights, [values, scores], upstream, materialize_grads=True)
    assert weights[0].isnan().all()
    assert grads[0].eq(0).all()
    assert grads[1][0].isnan().all()
    close(grads[1][1], torch.autograd.grad(scores.softmax(1), scores, upstream)[0][1])


def test_the_weights_of_tokens_alone_have_the_gradient_of_their_scores(backend):
    x, queries = tokens(2, 9, 16).requires_grad_(), tokens(3, 16, seed=1)
    _, weights = mk.query_pool(x, queries, return_weights=True, backend=backend)
    plain = (queries @ x.transpose(1, 2) * 16**-0.5).softmax(-1)
    close(*(torch.autograd.grad(made.square().sum(), x)[0] for made in (weights, plain)))


def test_of_equal_maxima_the_first_gets_the_gradient(backend):
    x = torch.zeros(1, 5, 4, device=DEVICE)
    x[0, 2:] = 1.0
    x.requires_grad_()
    mk.reduce_pool(x, "max", backend=backend).sum().backward()
    assert torch.equal(x.grad[0, 2], torch.ones(4, device=DEVICE))
    assert x.grad.sum().item() == 4.0


def test_the_maximum_of_minus_infinity_and_of_nan(backend):
    x = torch.full((1, 5, 2), float("-inf"), device=DEVICE)
    x[0, 3, 1] = NAN
    x[0, 4, 1] = 7.0
    x.requires_grad_()
    out = mk.reduce_pool(x, "max", backend=backend)
    assert out[0, 0].item() == float("-inf")
    assert out[0, 1].isnan()
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert grad[0, :, 0].tolist() == [1, 0, 0, 0, 0]
    assert grad[0, :, 1].tolist() == [0, 0, 0, 1, 0]


def test_of_nothing_but_minus_infinity_the_first_allowed_gets_the_gradient(backend):
    x = torch.full((2, 5, 8), float("-inf"), device=DEVICE).requires_grad_()
    mask = torch.tensor([[True] * 5, [False, False, False, True, True]], device=DEVICE)
    out = mk.reduce_pool(x, "max", num_prefix=1, mask=mask, backend=backend)
    assert out.eq(float("-inf")).all()
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert grad[0, :, 0].tolist() == [0, 1, 0, 0, 0]
    assert grad[1, :, 0].tolist() == [0, 0, 0, 1, 0]


def test_gem_lies_between_mean_and_maximum(backend):
    x = tokens(2, 9, 16).abs() + 0.1
    close(mk.reduce_pool(x, "gem", p=1.0, backend=backend), x.mean(1))
    close(mk.reduce_pool(x, "gem", p=3.0, backend=backend), x.pow(3).mean(1).pow(1 / 3))
    close(mk.reduce_pool(x, "gem", p=2.0, backend=backend), x.square().mean(1).sqrt())
    assert (mk.reduce_pool(x, "gem", p=20.0, backend=backend) <= x.amax(1)).all()


def test_gem_of_small_features_is_the_floor(backend):
    x = torch.full((1, 4, 8), -5.0, device=DEVICE).requires_grad_()
    out = mk.reduce_pool(x, "gem", eps=0.25, backend=backend)
    close(out, torch.full((1, 8), 0.25, device=DEVICE))
    assert torch.autograd.grad(out.sum(), x)[0].eq(0).all()


@pytest.mark.parametrize("p", [0.5, 1.0, 2.5, 3.0])
def test_the_gradient_of_gem_at_nan_and_infinity(backend, p):
    x = tokens(2, 9, 24).abs() + 0.1
    x[0, :4] = -1.0  # below eps, which hides nothing of the others
    x[0, 5, 0] = x[1, 2, 21] = NAN
    x[0, 6, 1] = x[1, 8, 23] = float("inf")
    x[0, 6, 2], x[0, 7, 2] = float("-inf"), NAN
    x.requires_grad_()
    out = mk.reduce_pool(x, "gem", p=p, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), x)
    with torch.no_grad():
        floored = torch.where(x < 1e-6, 1e-6, x)
        moment = floored.pow(p).mean(1, keepdim=True)
        slope = moment.pow(1 / p - 1) * floored.pow(p - 1) / 9
        expected = torch.where(x < 1e-6, 0.0, slope)
    torch.testing.assert_close(out, moment.squeeze(1).pow(1 / p), rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert grad[0, :4].eq(0).all()
    assert grad[0, 5, 0].isnan() == (p != 1.0)  # that of the mean is one constant


@pytest.mark.parametrize("p", [8.0, 50.0])
def test_gem_of_powers_that_vanish_is_0_without_a_gradient(backend, p):
    x = tokens(2, 9, 24).abs() + 0.5
    x[:, :, :3] = -1.0  # the floor, 1e-6, whose powers fp32 does not hold
    x.requires_grad_()
    exponents = [torch.tensor(p, device=DEVICE, requires_grad=True) for _ in range(2)]
    out = mk.reduce_pool(x, "gem", p=exponents[0], backend=backend)
    assert out[:, :3].eq(0).all()
    grad, slope = torch.autograd.grad(out.sum(), (x, exponents[0]))
    assert grad[:, :, :3].eq(0).all()
    assert grad.isfinite().all()
    others = mk.reduce_pool(x[:, :, 3:].detach(), "gem", p=exponents[1], backend=backend)
    close(out[:, 3:], others)
    close(slope, torch.autograd.grad(others.sum(), exponents[1])[0])


def test_the_gradient_of_gems_exponent_keeps_its_shape(backend):
    x = tokens(2, 9, 16).abs()
    for p in (torch.tensor(2.5), torch.tensor([2.5]), torch.tensor([[2.5]], dtype=torch.float64)):
        p = p.to(DEVICE).requires_grad_()
        (grad,) = torch.autograd.grad(mk.reduce_pool(x, "gem", p=p, backend=backend).sum(), p)
        assert (grad.shape, grad.dtype) == (p.shape, p.dtype)
        assert grad.item() > 0


def test_a_view_without_the_cls_token_is_not_copied(backend):
    x = tokens(2, 13, 24)
    queries = tokens(2, 24, seed=1)
    close(mk.query_pool(x[:, 1:], queries, backend=backend), mk.query_pool(x, queries, num_prefix=1, backend=backend))
    close(mk.reduce_pool(x[:, 1:, 3:11], "mean", backend=backend), x[:, 1:, 3:11].mean(1))


def test_one_image_gives_what_a_batch_gives(backend):
    if backend == "reference":
        pytest.skip("its matrix products depend on the batch")
    x, queries = tokens(40, 70, 16), tokens(2, 16, seed=1)
    close(mk.query_pool(x, queries, backend=backend)[:1], mk.query_pool(x[:1], queries, backend=backend))
