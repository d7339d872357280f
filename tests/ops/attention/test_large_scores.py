"""Attention where scores are huge, infinite or far apart: finite masks, hidden rows, tiny masses."""

import math

import pytest
import torch

from mimkernels import attention, attention_rows, head_divergence, received_attention
from mimkernels.ops._registry import BACKENDS
from mimkernels.testing import DEVICE

HERE = {
    "cpu": ("cpu", "triton", "cuda-emulated", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}[DEVICE]
HERE = [name for name in HERE if name in BACKENDS]
ALL = ("entropy", "prefix_mass", "self_mass", "distance", "patch_entropy", "peak", "patch_mass")
LOWEST = torch.finfo(torch.float32).min
MASKS = (-1e4, -1e9, torch.finfo(torch.float16).min, torch.finfo(torch.bfloat16).min, LOWEST)
# Beyond 2^24 an fp32 score has no room left for q k: rows of such scores are exactly uniform.
every_backend = pytest.mark.parametrize("backend", HERE)
every_mask = pytest.mark.parametrize("mask", MASKS)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def zeros(*shape):
    return torch.zeros(shape, device=DEVICE)


def close(made, exact, tolerance=1e-5):
    exact = torch.full_like(made, exact) if isinstance(exact, float) else exact.to(made.dtype)
    torch.testing.assert_close(made, exact, rtol=tolerance, atol=tolerance)


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def exact_scores(q, k, bias):
    """The scores as fp32 holds them, in fp64; the gradient is that of the exact sum."""
    s = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is None:
        return s
    rounded = (s.float() + bias.float()).double()
    s = s + bias.double()
    seen = rounded > -math.inf
    return torch.where(seen, s + (rounded - s).masked_fill(~seen, 0.0).detach(), s)


def exact_log_p(s):
    """log softmax in fp64; -inf on hidden keys, and in rows of none but those, without NaN gradients."""
    hidden = (s == -math.inf).all(-1, keepdim=True)
    return s.masked_fill(hidden, 0.0).log_softmax(-1).masked_fill(hidden, -math.inf)


def exact_attention(q, k, v, bias, num_prefix=0):
    """out, and the statistics that need no positions, in fp64 from the true softmax."""
    log_p = exact_log_p(exact_scores(q, k, bias))
    p = log_p.exp()
    finite = log_p.masked_fill(log_p == -math.inf, 0.0)
    patches = finite[..., num_prefix:].log_softmax(-1)
    return {
        "out": p @ v.double(),
        "entropy": -(p * finite).sum(-1),
        "prefix_mass": p[..., :num_prefix].sum(-1),
        "patch_mass": p[..., num_prefix:].sum(-1),
        "patch_entropy": -(patches.exp() * patches).sum(-1),
    }


def gradients(values, inputs):
    """Of all values together, each with its own drawn upstream."""
    upstream = {name: randn(*value.shape, seed=7).to(value.dtype) for name, value in values.items()}
    total = sum((value * upstream[name]).sum() for name, value in values.items())
    return torch.autograd.grad(total, inputs)


@every_mask
@every_backend
def test_a_row_of_equal_huge_scores_attends_uniformly(backend, mask):
    n = 12
    q = zeros(1, 2, n, 16)
    bias = torch.full((2, n, n), mask, device=DEVICE)
    v = randn(1, 2, n, 16)
    positions = torch.arange(n - 1.0, device=DEVICE)[:, None]
    made = attention(q, q, v, bias=bias, num_prefix=1, positions=positions, stats=ALL, backend=backend)
    close(made.out, v.mean(2, keepdim=True).expand_as(v))
    torch.testing.assert_close(made.lse, torch.full_like(made.lse, mask + math.log(n)))
    close(made.stats["entropy"], math.log(n))
    close(made.stats["patch_entropy"], math.log(n - 1))
    close(made.stats["self_mass"], 1 / n)
    close(made.stats["prefix_mass"], 1 / n)
    close(made.stats["patch_mass"], 1 - 1 / n)
    close(made.stats["peak"], 1 / n)
    close(made.stats["distance"][0, 0, 1:], (positions - positions.T).abs().sum(1) / n)
    close(received_attention(q, q, made.lse, bias=bias, backend=backend), 1 / n)
    close(head_divergence(q, q, made.lse, bias=bias, backend=backend), 0.0)


@every_mask
def test_rows_of_huge_scores_sum_to_one(mask):
    q, k = randn(2, 1, 2, 80, 16)
    bias = zeros(1, 80, 80)
    bias[0, :3] = mask
    rows = attention_rows(q, k, [0, 2, 50], bias=bias)
    close(rows.sum(-1), 1.0)
    close(rows, exact_log_p(exact_scores(q, k, bias)).exp()[:, :, [0, 2, 50]], 2e-3 if mask > -1e5 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@every_mask
@every_backend
def test_gradients_of_a_row_hidden_by_a_finite_mask_are_those_of_its_softmax(backend, mask, dtype):
    n = 80
    q, k, v = randn(3, 1, 2, n, 16, dtype=dtype).unbind(0)
    bias = 0.3 * randn(2, n, n, seed=1)
    bias[:, :2] = mask
    bias[:, :, 70:] = mask
    names = ("entropy", "prefix_mass", "patch_mass", "patch_entropy")
    inputs = leaves(q, k, v, bias)
    made = attention(*inputs[:3], bias=inputs[3], num_prefix=1, stats=names, backend=backend)
    made = {"out": made.out, **made.stats}
    exact_inputs = leaves(q.double(), k.double(), v.double(), bias)
    exact = exact_attention(*exact_inputs, num_prefix=1)
    # fp32 scores near -1e4 are a thousandth apart.
    tolerance = {torch.float32: 2e-3 if -1e5 < mask else 3e-5, torch.float16: 4e-3}[dtype]
    for name, value in made.items():
        close(value, exact[name], tolerance)
    exact = {name: exact[name] for name in made}
    got, wanted = gradients(made, inputs), gradients(exact, exact_inputs)
    for name, grad, other in zip(("q", "k", "v", "bias"), got, wanted, strict=True):
        torch.testing.assert_close(
            grad.double(), other.double(), rtol=tolerance, atol=tolerance * other.abs().max().item(), msg=name
        )


@every_mask
@every_backend
def test_keys_visible_after_a_block_of_hidden_ones_are_attended(backend, mask):
    # Left padding: all that is seen first is hidden.
    q, k, v = randn(3, 1, 1, 150, 16, dtype=torch.float16).unbind(0)
    bias = zeros(1, 1, 150, 150)
    bias[..., :130] = mask
    made = attention(q, k, v, bias=bias, backend=backend)
    visible = (exact_scores(q, k[:, :, 130:], None)).softmax(-1) @ v[:, :, 130:].double()
    close(made.out, visible, 2e-3)


@every_mask
@every_backend
def test_attention_received_from_hidden_rows_is_their_softmax(backend, mask):
    n = 70
    q, k = randn(2, 1, 2, n, 16)
    bias = 0.3 * randn(2, n, n, seed=1)
    bias[0, :40] = mask
    bias[:, :, 60:] = mask
    lse = attention(q, k, k, bias=bias, backend=backend).lse
    received = received_attention(q, k, lse, bias=bias, backend=backend)
    close(received, exact_log_p(exact_scores(q, k, bias)).exp().mean(2), 2e-3 if mask > -1e5 else 1e-5)
    close(received.sum(-1), 1.0)


@pytest.mark.parametrize("level", [20.0, 100.0, 3000.0, -3000.0])
@every_backend
def test_companions_lose_nothing_to_the_rounding_of_a_large_lse(backend, level):
    # A constant does not change a softmax; its scores may be a rounding of them apart.
    q, k = randn(2, 1, 3, 40, 16)
    bias = torch.full((1, 40, 40), level, device=DEVICE)
    lse = attention(q, k, k, bias=bias, backend=backend).lse
    p = exact_log_p(exact_scores(q, k, bias)).exp()
    rounding = abs(level) * 2.0**-23
    close(received_attention(q, k, lse, bias=bias, backend=backend), p.mean(2), 3e-6 + rounding)
    cross = (p[:, :, None] * (p[:, :, None].log() - p[:, None].log())).sum(-1).mean(-1)
    close(head_divergence(q, k, lse, bias=bias, backend=backend), cross, 1e-5 + 2 * rounding)


@every_backend
def test_divergence_of_heads_of_which_one_has_a_row_hidden_by_a_finite_mask(backend):
    q, k = randn(2, 1, 2, 9, 16)
    bias = zeros(1, 2, 9, 9)
    bias[0, 1, 0] = -1e9
    lse = attention(q, k, k, bias=bias, backend=backend).lse
    log_p = exact_log_p(exact_scores(q, k, bias))
    exact = (log_p.exp()[:, :, None] * (log_p[:, :, None] - log_p[:, None])).sum(-1).mean(-1)
    close(head_divergence(q, k, lse, bias=bias, backend=backend), exact)


@every_backend
def test_a_divergence_is_finite_where_its_sum_over_queries_is_not(backend):
    n = 17
    q, k = randn(2, 1, 2, n, 16)
    bias = zeros(1, 2, n, n)
    bias[0, 1, :, ::2] = LOWEST
    lse = attention(q, k, k, bias=bias, backend=backend).lse
    log_p = exact_log_p(exact_scores(q, k, bias))
    exact = (log_p.exp()[:, :, None] * (log_p[:, :, None] - log_p[:, None])).sum(-1).mean(-1)
    assert exact[0, 0, 1] > 1e38
    close(head_divergence(q, k, lse, bias=bias, backend=backend), exact)


@every_backend
def test_a_key_hidden_from_one_head_is_left_out_of_the_divergence(backend):
    q = zeros(1, 2, 4, 16)
    k = zeros(1, 2, 3, 16)
    bias = zeros(1, 2, 4, 3)
    bias[0, 1, :, 2] = -math.inf
    lse = attention(q, k, k, bias=bias, backend=backend).lse
    made = head_divergence(q, k, lse, bias=bias, backend=backend)
    # Of P^0 = (1/3, 1/3, 1/3) and P^1 = (1/2, 1/2, 0), two keys count.
    close(made[0, 0, 1], 2 / 3 * math.log(2 / 3))
    close(made[0, 1, 0], math.log(3 / 2))
    close(made.diagonal(dim1=1, dim2=2), 0.0)


@every_backend
def test_divergence_of_heads_with_hidden_keys_sums_over_the_keys_that_both_see(backend):
    q, k = randn(2, 2, 4, 40, 16)
    bias = randn(1, 4, 40, 40, seed=1)
    bias[randn(1, 4, 40, 40, seed=2) > 1] = -math.inf
    bias[0, 2, 5] = -math.inf
    lse = attention(q, k, k, bias=bias, backend=backend).lse
    log_p = exact_log_p(exact_scores(q, k, bias))
    seen = (log_p > -math.inf)[:, :, None] & (log_p > -math.inf)[:, None]
    finite = log_p.masked_fill(log_p == -math.inf, 0.0)
    terms = log_p.exp()[:, :, None] * (finite[:, :, None] - finite[:, None])
    close(head_divergence(q, k, lse, bias=bias, backend=backend), (terms * seen).sum(-1).mean(-1), 1e-5)


@every_backend
def test_a_row_hidden_by_infinity_has_no_gradient_and_spoils_no_other(backend):
    n = 20
    q, k, v = randn(3, 1, 2, n, 16).unbind(0)
    bias = 0.3 * randn(1, n, n, seed=1)
    bias[0, 1] = -math.inf
    bias[0, 4, 3:] = -math.inf
    names = ("entropy", "prefix_mass", "patch_mass", "patch_entropy")
    inputs = leaves(q, k, v, bias)
    made = attention(*inputs[:3], bias=inputs[3], num_prefix=1, stats=names, backend=backend)
    assert made.lse[:, :, 1].eq(-math.inf).all()
    assert all(value[:, :, 1].eq(0).all() for value in (made.out, *made.stats.values()))
    values = {"out": made.out, "entropy": made.stats["entropy"]}
    got = gradients(values, inputs)
    exact_inputs = leaves(q, k, v, bias)
    exact = exact_attention(*exact_inputs)
    wanted = gradients({name: exact[name].to(values[name].dtype) for name in values}, exact_inputs)
    for grad, other in zip(got, wanted, strict=True):
        close(grad, other, 2e-5)
    assert got[0][:, :, 1].eq(0).all()
    rest = torch.autograd.grad(
        attention(*inputs[:3], bias=inputs[3], num_prefix=1, stats=names, backend=backend).stats["patch_entropy"].sum(),
        inputs[:2],
    )
    assert all(grad.isfinite().all() for grad in rest)


def patch_entropy_below(gap, backend):
    """Of one row whose two patches lie ``gap`` and ``gap + 0.5`` below [cls]; its gradient to the scores."""
    bias = torch.tensor([[[0.0, -gap, -gap - 0.5]]], device=DEVICE, requires_grad=True)
    q, k = zeros(1, 1, 1, 8), zeros(1, 1, 3, 8)
    made = attention(q, k, k, bias=bias, num_prefix=1, stats=("patch_entropy",), backend=backend)
    (grad,) = torch.autograd.grad(made.stats["patch_entropy"].sum(), bias)
    return made.stats["patch_entropy"].item(), grad.flatten().tolist()


@pytest.mark.parametrize("gap", [0.0, 5.0, 30.0, 60.0, 68.0])
@every_backend
def test_patch_entropy_is_exact_down_to_a_mass_of_1e30th(backend, gap):
    value, grad = patch_entropy_below(gap, backend)
    p = 1 / (1 + math.exp(-0.5))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    slope = -p * (math.log(p) + entropy)
    assert value == pytest.approx(entropy, abs=3e-5)
    assert grad == pytest.approx([0.0, slope, -slope], abs=3e-5)


@pytest.mark.parametrize("gap", [70.0, 80.0, 86.0, 87.5, 90.0, 102.0, 110.0, 1e4])
@every_backend
def test_patches_of_less_mass_have_no_entropy_and_no_gradient(backend, gap):
    assert patch_entropy_below(gap, backend) == (0.0, [0.0, 0.0, 0.0])


@every_backend
def test_a_nan_in_a_query_reaches_all_its_statistics_and_no_other_row(backend):
    q, k, v = randn(3, 1, 1, 9, 16).unbind(0)
    q[0, 0, 3, 5] = math.nan
    positions = torch.rand(8, 2, device=DEVICE)
    made = attention(q, k, v, num_prefix=1, positions=positions, stats=ALL, backend=backend)
    row = torch.arange(9, device=DEVICE) == 3
    for name, value in {"lse": made.lse, "out": made.out[..., 0], **made.stats}.items():
        assert value[0, 0].isnan().tolist() == row.tolist(), name


@every_backend
def test_a_score_of_infinity_gives_an_infinite_lse(backend):
    q, k, v = randn(3, 1, 1, 9, 16).unbind(0)
    bias = zeros(1, 9, 9)
    bias[0, 2, 4] = math.inf
    made = attention(q, k, v, bias=bias, backend=backend)
    assert made.lse[0, 0, 2] == math.inf
    assert made.out[0, 0, 2].isnan().all()
    assert made.lse[0, 0, torch.arange(9) != 2].isfinite().all()
