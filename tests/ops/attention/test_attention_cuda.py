"""What the CUDA kernels of attention promise beyond the contract: every cut of the work, every option at once."""

import math

import pytest
import torch

from mimkernels import attention, head_divergence, received_attention, testing
from mimkernels.ops._registry import BACKENDS, backend_state
from mimkernels.testing import DEVICE

BACKEND = "cuda" if DEVICE == "cuda" else "cuda-emulated"
pytestmark = pytest.mark.skipif(
    BACKEND not in BACKENDS or backend_state(BACKEND) is not None, reason=f"{BACKEND} is not built"
)

ALL = ("entropy", "prefix_mass", "self_mass", "distance", "patch_entropy", "peak", "patch_mass")
CROSS = ("entropy", "prefix_mass", "patch_entropy", "peak", "patch_mass")


def case(label, batch, heads, queries, keys, dim, *, bias=None, mask=False, points=2, scale=None):
    """Every statistic that the shape allows; ``bias`` is the leading sizes of one."""

    def make(generator):
        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        key_mask = torch.rand(batch, keys, generator=generator) < 0.7 if mask else None
        return {
            "q": draw(batch, heads, queries, dim),
            "k": draw(batch, heads, keys, dim),
            "v": draw(batch, heads, keys, dim),
            "bias": None if bias is None else draw(*bias, queries, keys),
            "key_mask": key_mask,
            "positions": torch.rand(batch, keys - 2, points, generator=generator) * 9 if queries == keys else None,
            "num_prefix": 2,
            "stats": ALL if queries == keys else CROSS,
            "scale": scale,
        }

    return testing.Case("attention", label, make, ("q", "k", "v", "bias"))


CASES = [
    case("heads-share-blocks", 3, 5, 9, 9, 24, points=1),
    case("heads-share-blocks-cross", 3, 3, 5, 40, 8, bias=(3, 1)),
    case("one-query", 3, 2, 1, 150, 64, mask=True),
    case("one-key-tile-more-rows", 1, 2, 140, 20, 72, bias=(1, 2)),
    case("every-option", 2, 2, 150, 150, 40, bias=(1, 2), mask=True, points=3),
    case("cross-blocks", 2, 2, 70, 130, 96, bias=(1, 1), mask=True),
    case("negative-scale", 1, 2, 34, 34, 16, scale=-0.7),
    case("scale-zero", 1, 2, 18, 18, 16, scale=0.0),
    case("widest", 1, 1, 66, 66, 128, bias=(1, 1)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_matches_the_float64_oracle(case, dtype, poisoned):
    testing.check(case, BACKEND, dtype, DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float_bias_of_16_bit_inputs_gets_a_float_gradient(dtype):
    plain = {}
    for backend, kind in (("reference", torch.float64), ("reference", dtype), (BACKEND, dtype)):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, 3, 20, 16, generator=generator).to(dtype).to(DEVICE, kind) for _ in range(3))
        wide = torch.float64 if kind == torch.float64 else torch.float32
        bias = torch.randn(1, 3, 20, 20, generator=generator).to(DEVICE, wide).requires_grad_()
        out = attention(q, k, v, bias=bias, backend=backend).out
        (grad,) = torch.autograd.grad(out.float().square().sum() if wide == torch.float32 else out.square().sum(), bias)
        plain[backend, kind] = grad
    exact = plain["reference", torch.float64]
    assert plain[BACKEND, dtype].dtype == torch.float32
    error, allowed = ((plain[key].double() - exact).abs().max() for key in ((BACKEND, dtype), ("reference", dtype)))
    assert error <= 2 * allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [17, 130])
def test_rows_off_16_bytes_give_the_same_bits(tokens, dtype):
    packed = torch.randn(2, tokens, 3, 2, 32, device=DEVICE).to(dtype)
    wide = torch.zeros(2, tokens, 3, 2, 33, device=DEVICE, dtype=dtype)
    wide[..., 1:] = packed

    def run(packed):
        leaves = [x.detach().requires_grad_() for x in packed.permute(2, 0, 3, 1, 4)]
        made = attention(*leaves, stats=("entropy",), backend=BACKEND)
        total = (made.out.float() * torch.arange(32, device=DEVICE)).sum() + made.stats["entropy"].sum()
        received = received_attention(*leaves[:2], made.lse.detach(), backend=BACKEND)
        divergence = head_divergence(*leaves[:2], made.lse.detach(), backend=BACKEND)
        return [made.out, made.lse, *torch.autograd.grad(total, leaves), received, divergence]

    for a, b in zip(run(packed), run(wide[..., 1:]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [2, 50, 150])
def test_statistics_change_no_bit_of_out_lse_and_each_other(tokens, dtype):
    q, k, v = torch.randn(2, tokens, 3, 2, 32, device=DEVICE).to(dtype).permute(2, 0, 3, 1, 4)
    positions = torch.rand(tokens - 1, 2, device=DEVICE)
    plain = attention(q, k, v, backend=BACKEND)
    every = attention(q, k, v, num_prefix=1, positions=positions, stats=ALL, backend=BACKEND)
    assert torch.equal(every.out, plain.out)
    assert torch.equal(every.lse, plain.lse)
    for name in ALL:
        alone = attention(q, k, v, num_prefix=1, positions=positions, stats=(name,), backend=BACKEND)
        assert torch.equal(alone.out, plain.out)
        assert torch.equal(alone.stats[name], every.stats[name]), name


@pytest.mark.parametrize("tokens", [20, 90])
def test_a_nan_stays_in_the_rows_that_saw_it(tokens):
    q, k, v = (torch.randn(1, 2, tokens, 16, device=DEVICE) for _ in range(3))
    q[0, 1, 5, 3] = math.nan
    made = attention(
        q, k, v, num_prefix=1, positions=torch.rand(tokens - 1, 2, device=DEVICE), stats=ALL, backend=BACKEND
    )
    seen = torch.zeros(1, 2, tokens, dtype=torch.bool, device=DEVICE)
    seen[0, 1, 5] = True
    assert torch.equal(made.out.isnan().any(-1), seen)
    assert torch.equal(made.lse.isnan(), seen)
    for name, value in made.stats.items():
        assert torch.equal(value.isnan(), seen), name


def test_an_infinite_value_reaches_the_output_of_fp32():
    q, k, v = (torch.randn(1, 1, 20, 16, device=DEVICE) for _ in range(3))
    v[0, 0, 7, 2] = math.inf
    out = attention(q, k, v, backend=BACKEND).out
    assert out[..., 2].eq(math.inf).all()
    assert out[..., 3].isfinite().all()


@pytest.mark.parametrize("tokens", [40, 100])
def test_masked_keys_may_hold_anything(tokens):
    q, k, v = (torch.randn(2, 2, tokens, 16, device=DEVICE) for _ in range(3))
    key_mask = torch.rand(2, tokens, device=DEVICE) < 0.6
    wild = k.masked_fill(~key_mask[:, None, :, None], math.nan)
    a, b = (attention(q, x, v, key_mask=key_mask, stats=("entropy",), backend=BACKEND) for x in (k, wild))
    for left, right in ((a.out, b.out), (a.lse, b.lse), (a.stats["entropy"], b.stats["entropy"])):
        assert torch.equal(left, right)
    received = received_attention(q, wild, a.lse, key_mask=key_mask, backend=BACKEND)
    assert received[~key_mask[:, None].expand_as(received)].eq(0).all()
    assert received.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_divergence_of_more_heads_than_a_block_compares(dtype):
    q, k = (torch.randn(2, 9, 40, 16, device=DEVICE).to(dtype) for _ in range(2))
    bias = torch.randn(2, 1, 40, 40, device=DEVICE, dtype=dtype)
    exact = {"q": q.double(), "k": k.double(), "bias": bias.double()}
    lse = attention(exact["q"], exact["k"], exact["k"], bias=exact["bias"], backend="reference").lse
    expected = head_divergence(**exact, lse=lse, backend="reference")
    got = head_divergence(q, k, lse.float(), bias=bias, backend=BACKEND)
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-5)
    assert got.diagonal(dim1=1, dim2=2).eq(0).all()


def test_entries_outside_the_table_add_nothing():
    q = torch.randn(2, 2, 20, 16, device=DEVICE)
    table, index = torch.randn(3, 2, device=DEVICE), torch.arange(400, device=DEVICE).view(20, 20) % 6 - 1
    padded = torch.nn.functional.pad(table, (0, 0, 1, 2))
    raw = getattr(torch.ops.mimkernels.attention_fwd, BACKEND.replace("-", "_"))
    given = (None, None, 1.0, 0, None, 0)
    for wild, zeros in zip(
        raw(q, q, q, None, table, index, *given), raw(q, q, q, None, padded, index + 1, *given), strict=True
    ):
        assert torch.equal(wild, zeros)
