"""Both CUDA kernels of attention's forward pass: queries in registers, several strips per warp, or in shared memory."""

import pytest
import torch

from mimkernels import attention, testing
from mimkernels.ops._registry import BACKENDS, backend_state
from mimkernels.testing import DEVICE
from tests.ops.attention.cases import STATISTICS, case
from tests.ops.attention.cases import attention as inputs_of

BACKEND = "cuda" if DEVICE == "cuda" else "cuda-emulated"
pytestmark = pytest.mark.skipif(
    BACKEND not in BACKENDS or backend_state(BACKEND) is not None, reason=f"{BACKEND} is not built"
)
KERNEL = "MIMKERNELS_CUDA_ATTENTION"
FEW = ("entropy", "self_mass", "argmax")


@pytest.fixture(params=["strips", "one-strip"])
def kernel(request, monkeypatch):
    monkeypatch.setenv(KERNEL, request.param)
    return request.param


# Strips of 16 and 32 queries, blocks of 32 and 64 keys, tiles of 64: whole ones, one token less and one more; widths
# that kernels are compiled for, and some below; heads that share a block, and blocks that share a head.
CASES = {
    **{f"length-{n}": inputs_of(1, 3, n, 32, prefix=1, stats=STATISTICS) for n in (1, 15, 17, 31, 33)},
    "heads-of-two-images": inputs_of(2, 3, 50, 64, prefix=1, stats=STATISTICS, positions="per-image"),
    "length-197": inputs_of(1, 1, 197, 64, prefix=5, stats=STATISTICS),
    "plain-50": inputs_of(2, 3, 50, 64),
    "plain-64": inputs_of(1, 1, 64, 64),
    "plain-129": inputs_of(1, 2, 129, 64),
    "plain-197": inputs_of(1, 1, 197, 64),
    **{f"dim-{dim}": inputs_of(1, 2, 70, dim) for dim in (8, 40, 80, 128)},
    "stats-dim-128": inputs_of(1, 2, 66, 128, prefix=1, stats=STATISTICS),
    "cross": inputs_of(1, 2, 20, 32, keys=90, stats=("entropy", "peak", "argmax")),
    "one-query": inputs_of(2, 2, 1, 64, keys=150),
    "few-keys": inputs_of(1, 2, 140, 64, keys=3),
    "masked": inputs_of(2, 2, 70, 64, mask=True, prefix=1, stats=FEW),
    "windows": inputs_of(4, 2, 49, 32, bias=(2, 2, 49, 49), table=60, stats=FEW),
    "bias-hides": inputs_of(1, 2, 70, 64, bias=(1, 70, 70), hidden=True, prefix=1, stats=STATISTICS),
    "cosine": inputs_of(1, 2, 70, 64, cosine=True, prefix=1, stats=FEW),
    "huge-logits": inputs_of(1, 2, 70, 64, logits=300.0, prefix=1, stats=STATISTICS),
    "no-keys": inputs_of(2, 2, 5, 64, keys=0, stats=("entropy", "max_score", "argmax")),
    "no-keys-plain": inputs_of(2, 2, 5, 64, keys=0),
}


@pytest.mark.parametrize("label", CASES)
def test_matches_the_float64_oracle(label, kernel, poisoned):
    testing.check(case("attention", label, CASES[label]), BACKEND, torch.bfloat16, DEVICE)


@pytest.mark.parametrize("layout", ["strided", "permuted"])
@pytest.mark.parametrize("label", ["length-33", "plain-197"])
def test_of_fp16_in_other_layouts(label, layout, kernel, poisoned):
    testing.check(case("attention", label, CASES[label]), BACKEND, torch.float16, DEVICE, layout)


# For three coordinates of 1025 tokens shared memory has no room beside the tiles: the other kernel is taken.
@pytest.mark.parametrize(("points", "tokens"), [(1, 40), (3, 70), (3, 1025)])
def test_distances_in_any_number_of_dimensions(points, tokens, kernel):
    q, k, v = torch.randn(3, 1, 1, tokens, 8, device=DEVICE).bfloat16()
    positions = torch.rand(tokens - 2, points, device=DEVICE) * 9
    given = {"num_prefix": 2, "positions": positions, "stats": ("distance",)}
    exact = attention(
        q.double(), k.double(), v.double(), **given | {"positions": positions.double()}, backend="reference"
    )
    made = attention(q, k, v, **given, backend=BACKEND)
    torch.testing.assert_close(made.stats["distance"], exact.stats["distance"].float(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [64, 128])
def test_statistics_change_no_bit_of_out_and_lse(dim, kernel):
    q, k, v = torch.randn(3, 1, 2, 150, dim, device=DEVICE).bfloat16()
    positions = torch.rand(149, 2, device=DEVICE)
    plain = attention(q, k, v, backend=BACKEND)
    every = attention(q, k, v, num_prefix=1, positions=positions, stats=STATISTICS, backend=BACKEND)
    assert torch.equal(every.out, plain.out)
    assert torch.equal(every.lse, plain.lse)


def test_the_environment_chooses(monkeypatch):
    q, k, v = torch.randn(3, 1, 2, 197, 64, device=DEVICE).bfloat16()
    lse = {}
    for kernel in ("", "strips", "one-strip"):
        monkeypatch.setenv(KERNEL, kernel)
        lse[kernel] = attention(q, k, v, backend=BACKEND).lse
    assert torch.equal(lse[""], lse["strips"])
    assert not torch.equal(lse["strips"], lse["one-strip"])  # sums in another order
    torch.testing.assert_close(lse["strips"], lse["one-strip"], rtol=1e-6, atol=1e-6)
    monkeypatch.setenv(KERNEL, "none")
    with pytest.raises(ValueError, match="MIMKERNELS_CUDA_ATTENTION=none is none of: strips, one-strip"):
        attention(q, k, v, backend=BACKEND)
