"""Attention and its statistics: answers known without an oracle, and the promise of linear memory."""

import math
import subprocess
import sys

import pytest
import torch

from mimkernels import attention, attention_qkvpacked, attention_rows, head_divergence, received_attention
from mimkernels.testing import DEVICE

HERE = ("cpu", "triton", "reference") if DEVICE == "cpu" else ("triton", "reference")
ALL = ("entropy", "prefix_mass", "self_mass", "distance", "patch_entropy", "peak", "patch_mass")


def grid(side: int) -> torch.Tensor:
    axis = torch.arange(side, dtype=torch.float32)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1)


def zeros(*shape):
    return torch.zeros(shape, device=DEVICE)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, torch.full_like(a, b) if isinstance(b, float) else b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", HERE)
def test_uniform_attention_has_maximal_entropy(backend):
    n, prefix = 50, 1
    v = torch.randn(2, 3, n, 16, device=DEVICE)
    made = attention(
        zeros(2, 3, n, 16),
        torch.randn(2, 3, n, 16, device=DEVICE),
        v,
        num_prefix=prefix,
        positions=grid(7).to(DEVICE),
        stats=ALL,
        backend=backend,
    )
    close(made.stats["entropy"], math.log(n))
    close(made.stats["patch_entropy"], math.log(n - 1))
    close(made.stats["prefix_mass"], 1 / n)
    close(made.stats["patch_mass"], 1 - 1 / n)
    close(made.stats["self_mass"], 1 / n)
    close(made.stats["peak"], 1 / n)
    close(made.lse, math.log(n))
    close(made.out, v.mean(2, keepdim=True).expand_as(v))
    close(received_attention(zeros(2, 3, n, 16), v, made.lse, backend=backend), 1 / n)


@pytest.mark.parametrize("backend", HERE)
def test_uniform_attention_on_a_grid_has_the_grids_mean_distance(backend):
    # 2 x 2 patches: from any patch to itself 0, twice 1, once sqrt(2).
    made = attention(*(zeros(1, 1, 4, 8),) * 3, positions=grid(2).to(DEVICE), stats=("distance",), backend=backend)
    close(made.stats["distance"], (2 + math.sqrt(2)) / 4)
    # With a [cls] token a fifth of the mass leaves the patches, and the [cls] query itself has distance 0.
    made = attention(
        *(zeros(1, 1, 5, 8),) * 3, num_prefix=1, positions=grid(2).to(DEVICE), stats=("distance",), backend=backend
    )
    close(made.stats["distance"][..., 1:], (2 + math.sqrt(2)) / 5)
    close(made.stats["distance"][..., :1], 0.0)


@pytest.mark.parametrize("backend", HERE)
def test_identity_attention(backend):
    n = 16
    q = torch.eye(n, device=DEVICE)[None, None] * 400.0
    v = torch.randn(1, 1, n, n, device=DEVICE)
    made = attention(q, q / 400.0, v, scale=1.0, positions=grid(4).to(DEVICE), stats=ALL, backend=backend)
    close(made.out, v)
    close(made.stats["entropy"], 0.0)
    close(made.stats["self_mass"], 1.0)
    close(made.stats["peak"], 1.0)
    close(made.stats["distance"], 0.0)
    close(made.stats["patch_entropy"], 0.0)


@pytest.mark.parametrize("backend", HERE)
def test_one_hot_attention_on_a_prefix_token(backend):
    # Every query sees only [cls]; what the patches keep is too little to have an entropy.
    k = zeros(1, 1, 5, 8)
    k[:, :, 0] = 1000.0
    made = attention(
        torch.ones_like(k),
        k,
        torch.ones_like(k),
        num_prefix=1,
        positions=grid(2).to(DEVICE),
        stats=ALL,
        backend=backend,
    )
    close(made.stats["prefix_mass"], 1.0)
    close(made.stats["patch_mass"], 0.0)
    close(made.stats["distance"], 0.0)
    close(made.stats["patch_entropy"], 0.0)
    assert made.out.isfinite().all()


@pytest.mark.parametrize("backend", HERE)
def test_a_query_that_may_attend_nothing_gets_zeros(backend):
    x = torch.randn(2, 1, 6, 8, device=DEVICE, requires_grad=True)
    mask = torch.tensor([[True] * 6, [False] * 6], device=DEVICE)
    made = attention(x, x, x, key_mask=mask, num_prefix=1, positions=grid(3)[:5].to(DEVICE), stats=ALL, backend=backend)
    assert made.out[1].eq(0).all()
    assert made.lse[1].eq(-math.inf).all()
    for name, value in made.stats.items():
        assert value[1].eq(0).all(), name
    (made.out.sum() + sum(value.sum() for value in made.stats.values())).backward()
    assert x.grad[1].eq(0).all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("backend", HERE)
def test_means_over_no_queries_are_nan(backend):
    q, k, lse = zeros(1, 2, 0, 16), torch.randn(1, 2, 5, 16, device=DEVICE), zeros(1, 2, 0)
    for made in (received_attention(q, k, lse, backend=backend), head_divergence(q, k, lse, backend=backend)):
        assert made.numel() > 0 and made.isnan().all()


@pytest.mark.parametrize("backend", HERE)
def test_two_identical_heads_have_no_divergence(backend):
    q, k = (torch.randn(2, 1, 20, 16, device=DEVICE).repeat(1, 3, 1, 1) for _ in range(2))
    q[:, 2] = -q[:, 2]
    lse = attention(q, k, k, backend=backend).lse
    divergence = head_divergence(q, k, lse, backend=backend)
    close(divergence[:, :2, :2], 0.0)
    assert (divergence[:, 2, :2] > 0.1).all()
    assert (divergence[:, :2, 2] > 0.1).all()


def test_divergence_of_two_known_rows():
    # One query, two keys: P = (p, 1 - p) by the bias.
    p, r = 0.9, 0.4
    bias = torch.tensor([[[p, 1 - p]], [[r, 1 - r]]]).log()
    q, k = zeros(1, 2, 1, 8).cpu(), zeros(1, 2, 2, 8).cpu()
    lse = attention(q, k, k, bias=bias).lse
    expected = p * math.log(p / r) + (1 - p) * math.log((1 - p) / (1 - r))
    assert head_divergence(q, k, lse, bias=bias)[0, 0, 1].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("backend", HERE)
def test_rows_are_the_rows_of_the_matrix(backend):
    q, k, v = torch.randn(3, 2, 2, 12, 8, device=DEVICE)
    matrix = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
    lse = attention(q, k, v, backend=backend).lse
    close(attention_rows(q, k, [0, 7]), matrix[:, :, [0, 7]])
    close(received_attention(q, k, lse, backend=backend), matrix.mean(2))


def test_out_is_a_view_that_needs_no_transposing_copy():
    q, k, v = torch.randn(2, 10, 3, 4, 16).permute(2, 0, 3, 1, 4)
    out = attention(q, k, v).out
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("backend", "length"), [*((name, 20) for name in HERE[:-1]), (HERE[0], 330)])
def test_a_packed_gradient_is_the_three_gradients_side_by_side(backend, length):
    qkv = torch.randn(2, length, 3, 2, 16, device=DEVICE, requires_grad=True)
    bias = torch.randn(2, length, length, device=DEVICE, requires_grad=True)
    q, k, v = (x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0))
    options = {"bias": bias, "num_prefix": 1, "stats": ("entropy", "patch_entropy"), "backend": backend}
    packed, apart = attention_qkvpacked(qkv, **options), attention(q, k, v, **options)
    upstream = [torch.randn_like(x) for x in _tracked(apart)]
    assert all(torch.equal(a, b) for a, b in zip(_tracked(packed), _tracked(apart), strict=True))
    dqkv, dbias = torch.autograd.grad(_tracked(packed), [qkv, bias], upstream)
    dq, dk, dv, expected_dbias = torch.autograd.grad(_tracked(apart), [q, k, v, bias], upstream)
    assert dqkv.shape == qkv.shape and dqkv.is_contiguous()
    assert torch.equal(dqkv, torch.stack([x.transpose(1, 2) for x in (dq, dk, dv)], dim=2))
    assert torch.equal(dbias, expected_dbias)


def _tracked(made):
    return [made.out, made.lse, *made.stats.values()]


def test_a_packed_projection_that_needs_no_gradient_leaves_that_of_the_bias():
    qkv, bias = torch.randn(1, 6, 3, 2, 8), torch.randn(2, 6, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(attention_qkvpacked(qkv, bias=bias).out.sum(), bias)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    (expected,) = torch.autograd.grad(attention(q, k, v, bias=bias).out.sum(), bias)
    assert torch.equal(grad, expected)


def test_statistics_as_regularisers_move_the_statistic():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 16, 8)
    weight = torch.eye(8).requires_grad_()
    before = None
    for _ in range(20):
        entropy = attention(x @ weight, x, x, stats=("entropy",)).stats["entropy"].mean()
        before = entropy.item() if before is None else before
        (grad,) = torch.autograd.grad(entropy, weight)
        weight = (weight - 0.3 * grad).detach().requires_grad_()
    assert entropy.item() < before - 0.1


def test_peak_carries_no_gradient():
    x = torch.randn(1, 1, 5, 8, requires_grad=True)
    assert not attention(x, x, x, stats=("peak",)).stats["peak"].requires_grad


MEMORY = """
import resource, torch
from mimkernels import attention
def run(n):
    q, k, v = (torch.randn(1, 1, n, 32, requires_grad=True) for _ in range(3))
    made = attention(q, k, v, num_prefix=0, positions=torch.rand(n, 2), backend="cpu",
                     stats=("entropy", "distance", "self_mass", "patch_entropy"))
    (made.out.sum() + sum(s.sum() for s in made.stats.values())).backward()
run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(8192)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="the peak of the process is that of the host")
def test_memory_stays_linear():
    # One N x N matrix in fp32 at N = 8192 is 256 MiB; q, k, v, out, gradients and statistics are below 12.
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 1024, f"{int(done.stdout) / 1024:.0f} MiB more"


X = torch.randn(2, 2, 6, 8)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": X[0]}, ValueError, r"q must have 4 dimensions, got 3 \(\[2, 6, 8\]\)"),
        ({"k": X[:1]}, ValueError, r"k \[1, 2, 6, 8\] has size 1 in dimension 0 but q \[2, 2, 6, 8\] has 2"),
        ({"k": X[:, :1]}, ValueError, r"k \[2, 1, 6, 8\] has size 1 in dimension 1 but q"),
        ({"v": X[:, :, :5]}, ValueError, r"v \[2, 2, 5, 8\] and k \[2, 2, 6, 8\] must have the same shape"),
        ({"v": X.half()}, TypeError, r"v is torch.float16 but q is torch.float32"),
        ({"q": X.long()}, TypeError, r"q must be a floating-point tensor, got torch.int64"),
        ({"stats": ("entropi",)}, ValueError, "unknown statistic 'entropi'; known: entropy, prefix_mass"),
        ({"stats": "entropy"}, TypeError, "stats must be a sequence of names, got the string 'entropy'"),
        ({"stats": ("distance",)}, ValueError, "the statistic 'distance' needs positions, got None"),
        ({"stats": ("distance",), "positions": torch.rand(5, 2)}, ValueError, r"positions \[5, 2\] must be"),
        (
            {"stats": ("self_mass",), "q": X[:, :, :3]},
            ValueError,
            "self_mass needs self-attention, got 3 queries and 6",
        ),
        ({"num_prefix": 7}, ValueError, "num_prefix is 7 but there are 6 keys"),
        ({"bias": X[0, :, :5, :6]}, ValueError, r"bias \[1, 2, 5, 6\] must be \[W, H or 1, Nq, Nk\]"),
        ({"key_mask": torch.ones(2, 6)}, TypeError, "key_mask must be bool"),
        (
            {"key_mask": torch.ones(2, 5).bool()},
            ValueError,
            r"key_mask \[2, 5\] must be \[B, Nk\] for k \[2, 2, 6, 8\]",
        ),
    ],
)
def test_refuses(changed, error, message):
    with pytest.raises(error, match=message):
        attention(**{"q": X, "k": X, "v": X, **changed})


QKV = torch.randn(2, 6, 3, 2, 8)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"qkv": QKV[0]}, ValueError, r"qkv must have 5 dimensions, got 4 \(\[6, 3, 2, 8\]\)"),
        ({"qkv": QKV.transpose(2, 3)}, ValueError, r"qkv \[2, 6, 2, 3, 8\] must be \[B, N, 3, H, D\]"),
        ({"qkv": [QKV]}, TypeError, "qkv must be a torch.Tensor, got list"),
        ({"qkv": QKV.long()}, TypeError, "qkv must be a floating-point tensor, got torch.int64"),
        ({"stats": ("entropi",)}, ValueError, "unknown statistic 'entropi'; known: entropy, prefix_mass"),
        ({"stats": ("distance",)}, ValueError, "the statistic 'distance' needs positions, got None"),
        ({"stats": ("distance",), "positions": torch.rand(5, 2)}, ValueError, r"positions \[5, 2\] must be"),
        ({"num_prefix": 7}, ValueError, "num_prefix is 7 but there are 6 keys"),
        ({"bias": torch.rand(2, 5, 6)}, ValueError, r"bias \[1, 2, 5, 6\] must be \[W, H or 1, Nq, Nk\]"),
        ({"key_mask": torch.ones(2, 6)}, TypeError, "key_mask must be bool"),
    ],
)
def test_packed_refuses(changed, error, message):
    with pytest.raises(error, match="attention_qkvpacked: " + message):
        attention_qkvpacked(**{"qkv": QKV, **changed})


def test_an_lse_of_other_queries_is_refused():
    with pytest.raises(ValueError, match=r"lse \[2, 2, 5\] must be \[B, H, Nq\] of q \[2, 2, 6, 8\]"):
        received_attention(X, X, attention(X, X, X).lse[:, :, :5])


def test_head_dims_beyond_the_kernels_go_to_the_reference():
    x = torch.randn(1, 1, 4, 136)
    assert attention(x, x, x).out.shape == x.shape
    with pytest.raises(NotImplementedError, match="cpu: takes at most 128 head_dim, got 136"):
        attention(x, x, x, backend="cpu")
