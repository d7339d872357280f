"""Rounding errors do not grow with the number of tokens, whatever the backend and the instruction set."""

import pytest
import torch

from mimkernels import (
    add_layer_norm,
    attention,
    bias_gelu,
    fill_mask_tokens,
    gather_tokens,
    patchify_gather,
    query_pool,
    received_attention,
    reduce_pool,
    restore_tokens,
    testing,
    weighted_pool,
)
from mimkernels.ops._registry import BACKENDS, backend_state
from mimkernels.testing import DEVICE
from tests.test_instruction_sets import on_an_instruction_set

GPU = ("triton", "cuda") if DEVICE == "cuda" else ("triton", "cuda-emulated")
HERE = [name for name in GPU if name in BACKENDS and backend_state(name) is None]

TOKENS = 4096
# Relative, of sums of positive numbers. One chain of as many fp32 additions is off by 1e-6 to 3e-6.
ALLOWED = {
    "attention": 3e-7,
    "gradient of its values": 1.6e-7,
    "received_attention": 2.4e-7,
    "weighted_pool": 1.2e-6,
    "query_pool": 1.2e-6,
    "reduce_pool": 5e-7,
    "dot products": 1.8e-7,
}


def numbers(*shape: int) -> torch.Tensor:
    return 1 + 0.25 * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def error(made: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest, relative to the largest exact number."""
    return ((made.double() - exact).abs().max() / exact.abs().max()).item()


def errors() -> dict[str, float]:
    """Of uniform weights, whose sums are means."""
    found = {}
    v, upstream = numbers(1, 1, TOKENS, 24).requires_grad_(), numbers(1, TOKENS, 1, 24).transpose(1, 2)
    zero = torch.zeros(1, 1, TOKENS, 24)
    out = attention(zero, zero, v, backend="cpu").out
    (dv,) = torch.autograd.grad(out, v, upstream)
    found["attention"] = error(out, v.double().mean(2, keepdim=True))
    found["gradient of its values"] = error(dv, upstream.double().mean(2, keepdim=True))

    q, k = 0.1 * numbers(1, 1, 1, 24).expand(1, 1, TOKENS, 24), numbers(1, 40, 1, 24).transpose(1, 2)
    q, k, lse = q.detach(), k.detach(), torch.full((1, 1, TOKENS), 3.0)
    # Of a few rows, beside whole tiles of them: products of one row alone may round in another order.
    few = received_attention(q[:, :, :16], k, lse[:, :, :16], backend="cpu").double()
    received = received_attention(q, k, lse, backend="cpu").double()
    found["received_attention"] = ((received - few).abs() / few).max().item()

    x = numbers(16, TOKENS, 24)
    mean = x.double().mean(1)
    found["weighted_pool"] = error(weighted_pool(x, torch.zeros(16, TOKENS), backend="cpu").reshape(16, 24), mean)
    found["reduce_pool"] = error(reduce_pool(x, "mean", backend="cpu"), mean)
    found["query_pool"] = error(query_pool(x, torch.zeros(1, 24), backend="cpu").reshape(16, 24), mean)

    wide = numbers(2, 3, TOKENS)  # as features: the scores are their sums
    _, weights = query_pool(wide, torch.ones(1, TOKENS), scale=1 / 64, return_weights=True, backend="cpu")
    logarithms = 64 * weights.double().log().reshape(2, 3)
    sums = wide.double().sum(2)
    found["dot products"] = error((logarithms - logarithms[:, :1]) + sums[:, :1], sums)
    return found


def column_sums(backend: str, images: int, tokens: int, columns: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(Gradient, exact sum) of sums of rows, of numbers of either sign, so that little remains."""
    device = "cpu" if backend == "cpu" else DEVICE
    upstream = torch.randn(images, tokens, columns, generator=torch.Generator().manual_seed(0)).to(device)
    rows = upstream.double()
    x = torch.zeros_like(upstream)
    token, pos = torch.zeros_like(x[0, 0]).requires_grad_(), torch.zeros_like(x[0]).requires_grad_()

    found = {}
    ids = torch.arange(tokens, device=device).expand(images, -1)
    out = restore_tokens(x[:, :1], ids, token, pos, num_prefix=0, backend=backend)
    mask_token, positions = torch.autograd.grad(out, (token, pos), upstream)
    found["mask token of restore_tokens"] = mask_token, rows[:, 1:].sum((0, 1))
    found["positions of restore_tokens"] = positions, rows.sum(0)

    kept = x[:, :1].clone().requires_grad_()
    out = restore_tokens(kept, torch.zeros_like(ids), token, backend=backend)
    found["one token restored everywhere"] = torch.autograd.grad(out, kept, upstream)[0], rows.sum(1, keepdim=True)

    out = fill_mask_tokens(x, torch.ones_like(ids, dtype=torch.bool), token, backend=backend)
    found["mask token of fill_mask_tokens"] = torch.autograd.grad(out, token, upstream)[0], rows.sum((0, 1))

    one, prefix = x[:, :1].clone().requires_grad_(), torch.zeros_like(x[0, :1]).requires_grad_()
    out = gather_tokens(one, torch.zeros_like(ids[:, 1:]), pos=pos[:1], prefix=prefix, backend=backend)
    dx, dpos, dprefix = torch.autograd.grad(out, (one, pos, prefix), upstream)
    found["one token gathered everywhere"] = dx, rows[:, 1:].sum(1, keepdim=True)
    found["its position"] = dpos[0], rows[:, 1:].sum((0, 1))
    found["prefix of gather_tokens"] = dprefix, rows[:, :1].sum(0)

    picture = x[:, None, :1].clone().requires_grad_()
    out = patchify_gather(picture, torch.zeros_like(ids), patch_size=(1, columns), backend=backend)
    (dpicture,) = torch.autograd.grad(out, picture, upstream)
    found["one patch gathered everywhere"] = dpicture.reshape(images, columns), rows.sum(1)

    bias = torch.full_like(token, 64.0).requires_grad_()  # where the slope is 1
    sums = {"bias of bias_gelu": torch.autograd.grad(bias_gelu(x, bias, backend=backend), bias, upstream)[0]}
    if backend in testing.backends("add_layer_norm"):
        shift, scale = torch.zeros_like(token).requires_grad_(), torch.zeros_like(token).requires_grad_()
        out = add_layer_norm(x, torch.ones_like(x), None, shift, scale=scale, backend=backend)
        (sums["bias of add_layer_norm"],) = torch.autograd.grad(out.normalised, shift, upstream, retain_graph=True)
        (sums["scale of add_layer_norm"],) = torch.autograd.grad(out.residual, scale, upstream)
    exact = rows.sum((0, 1))
    within = 2**-24 * rows.abs().sum((0, 1))
    for name, made in sums.items():
        # On CPUs up to 32 rows are added in fp32: doubles would cost a fifth of the op's time.
        near = (made - exact).abs() <= (within if backend == "cpu" else 0)
        found[name] = made, torch.where(near, made.double(), exact)
    return found


EACH_ISA = pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
ERRORS = """
from tests.ops.test_long_sums import ALLOWED, errors
wrong = {name: error for name, error in errors().items() if error > ALLOWED[name]}
assert not wrong, wrong
"""
COLUMN_SUMS = """
from tests.ops.test_long_sums import check_column_sums
check_column_sums("cpu", 3, 333, 37)
check_column_sums("cpu", 700, 40, 5)
"""


@EACH_ISA
def test_sums_over_thousands_of_tokens_are_exact_to_a_few_roundings(isa):
    done = on_an_instruction_set(isa, "-c", ERRORS)
    assert done.returncode == 0, done.stderr


def check_column_sums(backend: str, *shape: int) -> None:
    sums = column_sums(backend, *shape)
    wrong = {
        name: (made.double() - exact).abs().max().item()
        for name, (made, exact) in sums.items()
        if not torch.equal(made, exact.float())
    }
    assert not wrong, wrong


@EACH_ISA
def test_sums_of_rows_are_rounded_once(isa):
    done = on_an_instruction_set(isa, "-c", COLUMN_SUMS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", HERE)
def test_sums_of_rows_are_rounded_once_on_gpus(backend, monkeypatch):
    if backend == "triton":
        monkeypatch.setattr("mimkernels.ops._triton.SUM_PROGRAMS", 8)  # so that each adds many images
        check_column_sums(backend, 30, 24, 5)
    else:
        check_column_sums(backend, 3, 333, 37)
        check_column_sums(backend, 700, 40, 5)
