"""Rounding errors of the CPU kernels do not grow with the number of tokens, whatever the instruction set."""

import pytest
import torch
from test_attention_cpu import on_an_isa

from mimkernels import attention, query_pool, received_attention, reduce_pool, weighted_pool

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


ON_AN_ISA = """
import sys
sys.path.insert(0, sys.argv[1])
import test_long_sums
wrong = {name: error for name, error in test_long_sums.errors().items() if error > test_long_sums.ALLOWED[name]}
assert not wrong, wrong
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_sums_over_thousands_of_tokens_are_exact_to_a_few_roundings(isa):
    on_an_isa(isa, ON_AN_ISA)
