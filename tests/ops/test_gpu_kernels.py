"""What both GPU backends promise where no case of the contract looks: empty tensors, settings, exactness in fp32."""

import math

import pytest
import torch

import mimkernels
from mimkernels import (
    attention,
    gather_tokens,
    masked_patch_loss,
    patchify_gather,
    query_pool,
    received_attention,
    reduce_pool,
)
from mimkernels.ops._registry import BACKENDS, backend_state
from mimkernels.testing import DEVICE

NAMES = ("triton", "cuda") if DEVICE == "cuda" else ("triton", "cuda-emulated")
HERE = [name for name in NAMES if name in BACKENDS and backend_state(name) is None]
every_backend = pytest.mark.parametrize("backend", HERE)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def leaves(*tensors):
    return [None if tensor is None else tensor.clone().requires_grad_() for tensor in tensors]


def plain(q, k, v, bias=None):
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (s if bias is None else s + bias).softmax(-1) @ v


def root_mean_square(error):
    return error.double().square().mean().sqrt().item()


# ---- tensors without elements ----


@pytest.mark.parametrize("tokens", [5, 20, 600])
@every_backend
def test_distances_of_a_sequence_without_patches_are_0(backend, tokens, poisoned):
    if backend == "triton" and DEVICE == "cpu":
        tokens = min(tokens, 300)  # beyond one pass and the fused backward, of 256 tokens, in a quarter of the time
    q = randn(1, 1, tokens, 8).requires_grad_()
    made = attention(
        *(q, q, q),
        num_prefix=tokens,
        positions=torch.zeros(0, 2, device=DEVICE),
        stats=("distance", "patch_entropy", "prefix_mass"),
        backend=backend,
    )
    assert made.stats["distance"].eq(0).all()
    assert made.stats["patch_entropy"].eq(0).all()
    torch.testing.assert_close(made.stats["prefix_mass"], torch.ones_like(made.stats["prefix_mass"]))
    (grad,) = torch.autograd.grad(made.stats["distance"].sum() + made.stats["patch_entropy"].sum(), q)
    assert grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("images", [1, 2])
@every_backend
def test_keys_that_no_query_attends_have_gradient_0(backend, images, dtype, poisoned):
    q, k = randn(images, 2, 0, 16, dtype=dtype), randn(images, 2, 8, 16, dtype=dtype)
    bias = randn(1, 2, 0, 8, dtype=dtype)
    inputs = leaves(q, k, k, bias)
    made = attention(*inputs[:3], bias=inputs[3], stats=("entropy",), backend=backend)
    grads = torch.autograd.grad(made.out.sum() + made.lse.sum() + made.stats["entropy"].sum(), inputs)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in inputs]
    assert all(grad.eq(0).all() for grad in grads)


@every_backend
def test_queries_that_have_no_key_give_0(backend, poisoned):
    q, k = randn(1, 2, 20, 16), randn(1, 2, 0, 16)
    bias = randn(1, 2, 20, 0)
    key_mask = torch.ones(1, 0, dtype=torch.bool, device=DEVICE)
    inputs = leaves(q, k, k, bias)
    made = attention(*inputs[:3], bias=inputs[3], key_mask=key_mask, stats=("entropy",), backend=backend)
    assert made.out.eq(0).all()
    assert made.lse.eq(-math.inf).all()
    assert made.stats["entropy"].eq(0).all()
    grads = torch.autograd.grad(made.out.sum() + made.stats["entropy"].sum(), inputs)
    assert all(grad.eq(0).all() for grad in grads)
    lse = made.lse.detach()
    assert mimkernels.received_attention(q, k, lse, bias=bias, key_mask=key_mask, backend=backend).shape == (1, 2, 0)
    assert mimkernels.head_divergence(q, k, lse, bias=bias, key_mask=key_mask, backend=backend).eq(0).all()


def empty(*shape, **options):
    return torch.zeros(shape, device=DEVICE, **options)


def ids(*shape):
    return torch.zeros(shape, dtype=torch.int64, device=DEVICE)


# Every optional tensor of every other op, without elements beside inputs that have some or none.
EMPTY = {
    "prefix of no token": lambda b: gather_tokens(randn(2, 5, 8), ids(2, 3), prefix=empty(0, 8), backend=b),
    "pos of no token": lambda b: gather_tokens(empty(2, 0, 8), ids(2, 0), pos=empty(0, 8), backend=b),
    "pos of no token beside a prefix": lambda b: gather_tokens(
        empty(2, 0, 8), ids(2, 0), pos=empty(0, 8), prefix=randn(3, 8), backend=b
    ),
    "pos of no channel": lambda b: gather_tokens(empty(2, 5, 0), ids(2, 3), pos=empty(5, 0), backend=b),
    "restored pos of no token": lambda b: mimkernels.restore_tokens(
        empty(2, 0, 8), ids(2, 0), randn(8), pos=empty(0, 8), backend=b
    ),
    "restored pos of no channel": lambda b: mimkernels.restore_tokens(
        empty(2, 1, 0), ids(2, 1), empty(0), pos=empty(1, 0), backend=b
    ),
    "ids of no patch": lambda b: patchify_gather(randn(2, 3, 8, 8), ids(2, 0), 4, backend=b),
    "constants of no channel": lambda b: patchify_gather(empty(2, 0, 8, 8), ids(2, 1), 4, mean=[], std=[], backend=b),
    "loss of no patch": lambda b: masked_patch_loss(
        empty(2, 0, 48), randn(2, 3, 8, 8), ids=ids(2, 0), patch_size=4, reduction="none", backend=b
    ),
    "mean loss of no patch": lambda b: masked_patch_loss(
        empty(2, 0, 48), randn(2, 3, 8, 8), ids=ids(2, 0), patch_size=4, backend=b
    ),
    "mask of no token": lambda b: reduce_pool(empty(2, 0, 8), "mean", mask=empty(2, 0, dtype=torch.bool), backend=b),
    "values of no token": lambda b: query_pool(
        empty(2, 0, 8), randn(3, 8), values=empty(2, 0, 8), mask=empty(2, 0, dtype=torch.bool), backend=b
    ),
    "scores of no token": lambda b: mimkernels.weighted_pool(
        empty(2, 0, 8), empty(2, 1, 0), mask=empty(2, 0, dtype=torch.bool), backend=b
    ),
    "bias of no channel": lambda b: mimkernels.bias_gelu(empty(2, 0), empty(0), backend=b),
    "bias of no row": lambda b: mimkernels.bias_gelu(empty(0, 8), randn(8), backend=b),
    "parameters of no channel": lambda b: mimkernels.add_layer_norm(
        empty(2, 3, 0), empty(2, 3, 0), empty(0), empty(0), scale=empty(0), drop=randn(2), backend=b
    ),
    "factors of no image": lambda b: mimkernels.add_layer_norm(
        empty(0, 3, 8), empty(0, 3, 8), randn(8), randn(8), scale=randn(8), drop=empty(0), backend=b
    ),
}


@pytest.mark.parametrize("name", EMPTY)
@every_backend
def test_empty_optional_tensors_are_given_ones(backend, name, poisoned):
    results = []
    for which in (backend, "reference"):
        try:
            results.append(EMPTY[name](which))
        except (ValueError, NotImplementedError) as error:
            results.append(error)
    made, expected = results
    if isinstance(expected, Exception):
        assert type(made) is type(expected)
        return
    made, expected = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (made, expected))
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


# ---- settings ----


@pytest.fixture
def matmul_setting():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


@pytest.mark.skipif("triton" not in HERE, reason="triton is not here")
@pytest.mark.parametrize("precision", ["tf32", "ieee", "none"])
def test_fp32_attention_follows_the_current_name_of_the_tf32_setting(matmul_setting, precision):
    from mimkernels.ops.attention.triton_blocks import dot_precision

    matmul_setting.fp32_precision = precision
    assert dot_precision(torch.float32) == ("tf32" if precision == "tf32" else "ieee")
    assert dot_precision(torch.float16) == "ieee"
    q, k, v = leaves(*randn(3, 1, 1, 9, 16).unbind(0))
    made = attention(q, k, v, backend="triton")
    grads = torch.autograd.grad(made.out.square().sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)
    mimkernels.received_attention(q, k, made.lse, backend="triton")
    mimkernels.head_divergence(q, k, made.lse, backend="triton")


@pytest.mark.skipif("triton" not in HERE, reason="triton is not here")
def test_fp32_attention_follows_the_older_name_of_the_tf32_setting(matmul_setting):
    from mimkernels.ops.attention.triton_blocks import dot_precision

    for allowed in (True, False):
        matmul_setting.allow_tf32 = allowed
        assert dot_precision(torch.float32) == ("tf32" if allowed else "ieee")


# ---- exactness ----


@every_backend
def test_fp32_gradients_are_as_exact_as_those_of_plain_fp32(backend):
    # Few tokens and features: sums are short, so that the rounding of lse would show.
    tensors = randn(3, 1, 1, 40, 16).unbind(0)
    upstream = randn(1, 1, 40, 16, seed=1)
    inputs, plain_inputs, exact_inputs = leaves(*tensors), leaves(*tensors), leaves(*(x.double() for x in tensors))
    got = torch.autograd.grad(attention(*inputs, backend=backend).out, inputs, upstream)
    usual = torch.autograd.grad(plain(*plain_inputs), plain_inputs, upstream)
    exact = torch.autograd.grad(plain(*exact_inputs), exact_inputs, upstream.double())
    for name, one, other, right in zip("qkv", got, usual, exact, strict=True):
        assert root_mean_square(one - right) < 1.4 * root_mean_square(other - right), name


@every_backend
def test_fp32_scores_of_wide_heads_are_the_same_backward_as_forward(backend):
    # Scores of about 800: their rounding is much of P, unless it is the same in both directions.
    q, k, v = randn(3, 1, 1, 40, 128).unbind(0)
    q = q * 300
    inputs, exact_inputs = leaves(q, k, v), leaves(q.double(), k.double(), v.double())
    upstream = randn(1, 1, 40, 128, seed=1)
    made = attention(*inputs, backend=backend).out
    dv = torch.autograd.grad(made, inputs, upstream)[2]
    exact = plain(*exact_inputs)
    # P of the kernels, whose scores differ from exact ones by their own rounding, is seen in out and in dv alike.
    out_error = root_mean_square(made - exact) / root_mean_square(exact)
    exact_dv = torch.autograd.grad(exact, exact_inputs, upstream.double())[2]
    assert root_mean_square(dv - exact_dv) / root_mean_square(exact_dv) < 3 * out_error


@pytest.mark.parametrize("leading", [(1, 1), (1, 2), (2, 2)], ids=str)
@every_backend
def test_the_gradient_of_an_fp32_bias_is_more_exact_than_16_bit_outputs(backend, leading):
    # 50 queries fit one block of the fused kernels, 150 do not.
    for tokens in (50, 150):
        q, k, v = randn(3, 2, 2, tokens, 32, dtype=torch.float16).unbind(0)
        bias = randn(*leading, tokens, tokens, seed=1)
        upstream = randn(2, 2, tokens, 32, seed=2, dtype=torch.float16)
        inputs, exact_inputs = leaves(q, k, v, bias), leaves(q.double(), k.double(), v.double(), bias.double())
        made = attention(*inputs[:3], bias=inputs[3], stats=("entropy",), backend=backend)
        # The statistic's gradient passes by way of coefficients.
        (got,) = torch.autograd.grad((made.out * upstream).sum() + made.stats["entropy"].sum(), inputs[3])
        out = plain(*exact_inputs)
        s = exact_inputs[0] @ exact_inputs[1].transpose(-1, -2) * 32**-0.5 + exact_inputs[3]
        entropy = -(s.softmax(-1) * s.log_softmax(-1)).sum()
        (exact,) = torch.autograd.grad((out * upstream.double()).sum() + entropy, exact_inputs[3])
        assert root_mean_square(got - exact) < 3e-6 * root_mean_square(exact)


@pytest.mark.parametrize("kind", ["mse", "l1"])
@every_backend
def test_losses_of_large_patches_add_no_long_chains(backend, kind):
    images, pred = randn(1, 3, 64, 384).abs(), randn(1, 6, 64 * 64 * 3)
    chosen = torch.arange(6, device=DEVICE)[None]
    options = {"ids": chosen, "patch_size": 64, "kind": kind, "norm_pix": True, "reduction": "none"}
    got = masked_patch_loss(pred, images, **options, backend=backend)
    exact = masked_patch_loss(pred.double(), images.double(), **options, backend="reference")
    assert root_mean_square((got - exact) / exact) < 1.45 * 2.0**-24


@every_backend
def test_attention_received_from_like_rows_adds_no_long_chains(backend):
    q, k = randn(1, 1, 1, 16).expand(1, 1, 4096, 16), randn(1, 1, 40, 16, seed=1)
    lse = torch.full((1, 1, 4096), 3.0, device=DEVICE)
    one = received_attention(q[:, :, :1], k, lse[:, :, :1], backend=backend)
    got = received_attention(q, k, lse, backend=backend)
    assert ((got.double() - one.double()) / one.double()).abs().max() < 7e-7


@every_backend
def test_a_mean_over_ids_has_one_divisor_where_an_id_is_out_of_range(backend, monkeypatch):
    # On GPUs ids are not checked, as that would wait for the device; here the check is left out.
    if backend == "triton":
        monkeypatch.setattr("mimkernels.ops._triton.check_ids", lambda *_: None)
    images, pred = randn(1, 1, 8, 8), randn(1, 4, 16, seed=1).requires_grad_()
    chosen = torch.tensor([[0, 1, 7, 2]], device=DEVICE)
    loss = masked_patch_loss(pred, images, ids=chosen, patch_size=4, backend=backend)
    (grad,) = torch.autograd.grad(loss, pred)
    # The loss is square in the differences: twice itself is their product with the gradient.
    rows = images.unfold(2, 4, 4).unfold(3, 4, 4).reshape(1, 4, 16)[:, [0, 1, 0, 2]]
    difference = (pred - rows).detach()
    difference[:, 2] = 0.0
    torch.testing.assert_close((grad * difference).sum(), 2 * loss.detach())
    assert grad[:, 2].eq(0).all()
