"""What the CPU kernels of attention promise beyond the contract: exponential, bits, instruction sets."""

import math
import os
import subprocess
import sys

import pytest
import torch

from mimkernels import attention, head_divergence, received_attention
from mimkernels.ops import _native
from tests.test_instruction_sets import ISAS, skip_what_is_too_wide

pytestmark = pytest.mark.skipif(not _native.library("cpu").loaded, reason="the CPU library is not built")

ALL = ("entropy", "prefix_mass", "self_mass", "distance", "patch_entropy", "peak", "patch_mass")


def exponential(x: torch.Tensor) -> torch.Tensor:
    """exp as the kernels compute it: with one query, an lse of 0 and scores x, received attention is exp(x)."""
    q, k = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, x.numel(), 8)
    q[..., 0] = 1.0
    k[..., 0] = x
    return received_attention(q, k, torch.zeros(1, 1, 1), scale=1.0, backend="cpu").flatten()


def test_the_exponential_is_within_two_units_in_the_last_place():
    x = torch.cat([torch.linspace(-87.3, 0.0, 200_001), torch.linspace(-1.0, 1.0, 100_001)])
    exact = x.double().exp()
    unit = torch.exp2(exact.log2().floor() - 23)
    assert ((exponential(x).double() - exact).abs() / unit).max() <= 2.0


def test_the_exponential_at_its_ends():
    x = torch.tensor([0.0, -88.0, -1e4, -math.inf, -3e38, math.nan])
    got = exponential(x)
    assert got[:5].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert got[5].isnan()
    # In between nothing is negative, and nothing grows where x falls.
    tail = exponential(torch.linspace(-87.0, -89.0, 4001))
    assert (tail >= 0).all()
    assert (tail.diff() <= 0).all()


def check_short_exponential():
    """The first of two keys, whose score is x beside one of 0, has P_1 / P_2 = exp(x)."""
    x = torch.cat([torch.linspace(-87.3, 0.0, 40_001), torch.linspace(-1.0, 0.0, 20_001)])
    q, k = (torch.zeros(1, 1, n, 8, dtype=torch.bfloat16) for n in (x.numel(), 2))
    made = attention(
        q,
        k,
        k,
        bias=torch.stack([x, torch.zeros_like(x)], -1)[None],
        num_prefix=1,
        stats=("prefix_mass", "patch_mass"),
        backend="cpu",
    )
    p = (made.stats["prefix_mass"].double() / made.stats["patch_mass"].double()).flatten()
    divisions = 2 * 2**-23
    exact = x.double().exp()
    assert ((p / exact - 1).abs() <= 1.7e-7 + 1.3e-7 * x.abs() + divisions).all()
    assert ((p - exact).abs() <= 1.7e-7 + divisions).all()
    assert (p[x == 0] == 1).all()


def test_the_exponential_of_bf16_is_as_exact_as_stated():
    check_short_exponential()


def everything(batch, heads, queries, keys, dim, dtype=torch.float32, bias=None, seed=0):
    """All outputs and gradients of one call, and the companion ops."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    q, k, v = draw(batch, heads, queries, dim), draw(batch, heads, keys, dim), draw(batch, heads, keys, dim)
    leaves = [q, k, v] + ([draw(*bias, queries, keys)] if bias else [])
    leaves = [leaf.requires_grad_() for leaf in leaves]
    square = queries == keys
    stats = ALL if square else ("entropy", "prefix_mass", "patch_entropy")
    key_mask = torch.rand(batch, keys, generator=generator) < 0.8
    options = {"bias": leaves[3] if bias else None, "key_mask": key_mask}
    made = attention(
        *leaves[:3],
        **options,
        num_prefix=2,
        positions=torch.rand(keys, 2, generator=generator) if square else None,
        stats=stats,
        backend="cpu",
    )
    total = (made.out.float() * torch.randn(made.out.shape, generator=generator)).sum()
    total = total + sum(s.sum() for name, s in made.stats.items() if name != "peak")
    grads = torch.autograd.grad(total, leaves)
    lse = made.lse.detach()
    received = received_attention(q, k, lse, **options, backend="cpu")
    divergence = head_divergence(q, k, lse, **options, backend="cpu")
    return [made.out, lse, *made.stats.values(), *grads, received, divergence]


SHAPES = [
    {"batch": 3, "heads": 4, "queries": 50, "keys": 50, "dim": 64},
    {"batch": 1, "heads": 1, "queries": 300, "keys": 300, "dim": 24},  # one head, cut into chunks of rows
    {"batch": 1, "heads": 2, "queries": 700, "keys": 700, "dim": 32, "bias": (1, 1)},  # several blocks of keys
    {"batch": 2, "heads": 8, "queries": 33, "keys": 61, "dim": 40, "bias": (1, 8)},
    {"batch": 2, "heads": 3, "queries": 80, "keys": 19, "dim": 16, "bias": (2, 1), "dtype": torch.bfloat16},
    {"batch": 2, "heads": 3, "queries": 65, "keys": 65, "dim": 72, "bias": (2, 3), "dtype": torch.float16},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_for_any_number_of_threads_and_twice(shape):
    threads = torch.get_num_threads()
    made = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            made.append(everything(**shape))
    finally:
        torch.set_num_threads(threads)
    for other in made[1:]:
        for a, b in zip(made[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("tokens", [2, 50, 197, 600])
def test_statistics_change_no_bit_of_out_and_lse(tokens):
    q, k, v = torch.randn(2, tokens, 3, 2, 32).permute(2, 0, 3, 1, 4)
    positions = torch.rand(tokens - 1, 2)
    plain = attention(q, k, v, backend="cpu")
    for stats in (("entropy",), ("distance",), ("patch_mass",), ALL):
        made = attention(q, k, v, num_prefix=1, positions=positions, stats=stats, backend="cpu")
        assert torch.equal(made.out, plain.out)
        assert torch.equal(made.lse, plain.lse)


def test_a_statistic_does_not_depend_on_which_others_are_asked_for():
    q, k, v = torch.randn(3, 2, 2, 70, 32)
    options = {"num_prefix": 3, "positions": torch.rand(67, 2), "backend": "cpu"}
    every = attention(q, k, v, stats=ALL, **options).stats
    for name in ALL:
        alone = attention(q, k, v, stats=(name,), **options).stats[name]
        assert torch.equal(alone, every[name]), name


@pytest.mark.parametrize("tokens", [50, 600])
def test_masked_keys_may_hold_anything(tokens):
    q, k, v = torch.randn(3, 2, 2, tokens, 16)
    key_mask = torch.rand(2, tokens) < 0.6
    hidden = ~key_mask[:, None, :, None]
    wild = k.masked_fill(hidden, math.nan)
    a = attention(q, k, v, key_mask=key_mask, stats=("entropy",), backend="cpu")
    b = attention(q, wild, v, key_mask=key_mask, stats=("entropy",), backend="cpu")
    for left, right in ((a.out, b.out), (a.lse, b.lse), (a.stats["entropy"], b.stats["entropy"])):
        assert torch.equal(left, right)
    received = received_attention(q, k, a.lse, key_mask=key_mask, backend="cpu")
    assert received[~key_mask[:, None].expand_as(received)].eq(0).all()


ON_AN_ISA = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_attention_cpu import SHAPES, everything
torch.save([everything(**shape) for shape in SHAPES], sys.argv[2])
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_a_bias_is_exact_where_all_keys_have_one_value(dtype):
    # Through out it is 0; through lse it is P times what lse gets. Values are large beside that.
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 64, 40, generator=generator).to(dtype) for _ in range(3))
    v = 8 * v[:, :, :1].expand_as(v)
    bias = torch.randn(2, 64, 64, generator=generator).requires_grad_()
    upstream, by_lse = (
        torch.randn(2, 2, 64, 40, generator=generator).to(dtype),
        torch.randn(2, 2, 64, generator=generator),
    )
    made = attention(q, k, v, bias=bias, backend="cpu")
    (grad,) = torch.autograd.grad([made.out, made.lse], bias, [upstream, by_lse])
    p = (q.double() @ k.double().transpose(-1, -2) * 40**-0.5 + bias.double()).softmax(-1)
    exact = (p * by_lse.double()[..., None]).sum(0)
    assert ((grad - exact).abs() / p.sum(0)).max() < 3e-6


def on_an_isa(isa: str, code: str, *arguments: str) -> None:
    """Run code in a process whose kernels are those of one instruction set; skip where it has none."""
    skip_what_is_too_wide(isa)
    command = [sys.executable, "-c", code, os.path.dirname(__file__), *arguments]
    done = subprocess.run(command, env={**os.environ, "MIMKERNELS_CPU_ISA": isa}, capture_output=True, text=True)
    if done.returncode and ("does not support it" in done.stderr or "is not an instruction set" in done.stderr):
        pytest.skip(f"this CPU or this build has no {isa}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets_agree(isa, tmp_path):
    on_an_isa(isa, ON_AN_ISA, str(tmp_path / "made.pt"))
    for shape, theirs in zip(SHAPES, torch.load(tmp_path / "made.pt"), strict=True):
        wide = shape.get("dtype", torch.float32) == torch.float32
        for a, b in zip(everything(**shape), theirs, strict=True):
            tolerance = 2e-4 if wide or a.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(b.float(), a.float(), rtol=tolerance, atol=tolerance)


BF16_PRODUCTS = """
import sys, torch, mimkernels
assert torch.ops.mimkernels.cpu_isa() == sys.argv[2]
sys.path.insert(0, sys.argv[1])
from test_attention_cpu import check_odd_strides, check_short_exponential
check_odd_strides()
check_short_exponential()
"""


def check_odd_strides():
    """Rows of q, k, v and of the gradient start at odd elements: no pair of theirs is aligned."""
    packed = torch.randn(2, 3, 31, 41).to(torch.bfloat16)
    tokens = [packed[..., 1:].clone() for _ in range(3)]
    apart = [torch.cat([x, x[..., :1]], -1)[..., :40].requires_grad_() for x in tokens]
    together = [x.clone().contiguous().requires_grad_() for x in tokens]
    upstream = torch.randn(2, 3, 31, 41).to(torch.bfloat16)[..., 1:]
    made = []
    for q, k, v in (apart, together):
        out = attention(q, k, v, stats=("entropy",), backend="cpu")
        grads = torch.autograd.grad([out.out, out.stats["entropy"]], [q, k, v], [upstream, torch.ones_like(out.lse)])
        made.append([out.out, out.stats["entropy"], *grads])
        upstream = upstream.contiguous()
    assert apart[0].stride(2) == 41
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b)


def test_odd_strides_change_no_bit():
    check_odd_strides()


@pytest.mark.parametrize("isa", [isa for isa in ISAS if "_" in isa])
def test_products_of_bf16_take_odd_strides_and_exact_exponentials(isa):
    on_an_isa(isa, BF16_PRODUCTS, isa)
