"""Both kernels of attention_bwd in CUDA C++, of which MIMKERNELS_CUDA_ATTENTION_BWD names one."""

import dataclasses

import pytest
import torch

from mimkernels import attention, attention_qkvpacked, testing
from mimkernels.ops._registry import BACKENDS, backend_state
from mimkernels.testing import DEVICE
from tests.ops.attention.test_attention_cuda import case

BACKEND = "cuda" if DEVICE == "cuda" else "cuda-emulated"
VARIABLE = "MIMKERNELS_CUDA_ATTENTION_BWD"
VARIANTS = ("one-pass", "two-passes")
pytestmark = pytest.mark.skipif(
    BACKEND not in BACKENDS or backend_state(BACKEND) is not None, reason=f"{BACKEND} is not built"
)


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch):
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


def plain(label, *shape, **options):
    """The same without statistics."""
    full = case(label, *shape, **options)
    return dataclasses.replace(full, make=lambda generator: {**full.make(generator), "stats": (), "positions": None})


CASES = [
    *(case(f"tokens-{tokens}", 1, 2, tokens, tokens, 64) for tokens in (4, 15, 17, 33, 50)),
    *(case(f"dim-{dim}", 1, 1, 34, 34, dim, points=1 + dim % 3) for dim in (8, 24, 40, 96, 128)),
    case("long", 1, 1, 197, 197, 64),
    case("long-narrow", 1, 1, 197, 197, 32, points=3),
    case("too-long", 1, 1, 258, 20, 64),
    case("masked", 2, 2, 50, 50, 64, mask=True),
    case("masked-narrow", 2, 1, 37, 37, 16, mask=True, points=3),
    case("few-queries", 3, 2, 1, 150, 64, mask=True),
    case("few-keys", 1, 2, 130, 20, 32),
    *(plain(f"plain-{tokens}", 1, 2, tokens, tokens, 64) for tokens in (2, 16, 49)),
    plain("plain-long", 1, 1, 197, 197, 64),
    plain("plain-masked", 2, 3, 33, 33, 48, mask=True),
    plain("two-keys", 1, 3, 20, 2, 64),
    case("heads-share-blocks", 3, 3, 9, 9, 24),
    case("negative-scale", 1, 2, 34, 34, 16, scale=-0.7),
    case("bias", 1, 2, 20, 20, 32, bias=(1, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_matches_the_float64_oracle(case, variant, poisoned):
    testing.check(case, BACKEND, torch.bfloat16, DEVICE)


def test_matches_the_float64_oracle_in_fp16(variant, poisoned):
    testing.check(case("half", 1, 2, 40, 40, 64), BACKEND, torch.float16, DEVICE)


def gradients(packed: torch.Tensor, stats: tuple[str, ...] = ()) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in packed.permute(2, 0, 3, 1, 4)]
    made = attention(*leaves, num_prefix=1, stats=stats, backend=BACKEND)
    total = (made.out.float() * torch.arange(packed.shape[-1], device=DEVICE)).sum()
    total = total + sum(value.sum() for value in made.stats.values())
    return list(torch.autograd.grad(total, leaves))


def drawn(batch: int, tokens: int, heads: int, dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, tokens, 3, heads, dim, generator=generator).to(DEVICE, torch.bfloat16)


@pytest.mark.parametrize("stats", [(), ("entropy", "self_mass")], ids=["plain", "statistics"])
def test_every_run_gives_the_same_bits_wherever_heads_lie(stats, variant):
    packed = drawn(2, 50, 3, 64)
    first = gradients(packed, stats)
    for again in (gradients(packed, stats), [x.flip(0) for x in gradients(packed.flip(0), stats)]):
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)


def test_a_packed_gradient_has_the_same_bits(variant):
    packed = drawn(2, 37, 2, 32)
    apart = gradients(packed)
    leaf = packed.clone().requires_grad_()
    out = attention_qkvpacked(leaf, backend=BACKEND).out
    (made,) = torch.autograd.grad((out.float() * torch.arange(32, device=DEVICE)).sum(), leaf)
    for a, b in zip(apart, made.permute(2, 0, 3, 1, 4), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dim", [32, 64])
def test_rows_off_16_bytes_give_the_same_bits(dim, variant):
    packed = drawn(1, 40, 2, dim)
    wide = torch.zeros(1, 40, 3, 2, dim + 1, device=DEVICE, dtype=torch.bfloat16)
    wide[..., 1:] = packed
    for a, b in zip(gradients(packed), gradients(wide[..., 1:]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tokens", [50, 197])
def test_both_variants_agree(tokens, monkeypatch):
    packed = drawn(1, tokens, 1, 64)
    made = {}
    for name in VARIANTS:
        monkeypatch.setenv(VARIABLE, name)
        made[name] = gradients(packed)
    for a, b in zip(*made.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * b.abs().max().item())
    assert any(not torch.equal(a, b) for a, b in zip(*made.values(), strict=True)), "the same kernel ran twice"


def test_an_unknown_variant_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "three-passes")
    with pytest.raises(ValueError, match="three-passes is none of: one-pass, two-passes"):
        gradients(drawn(1, 5, 1, 16))
