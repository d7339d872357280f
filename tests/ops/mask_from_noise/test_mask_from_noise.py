"""mask_from_noise: integers that are exactly right on every backend."""

import pytest
import torch

from mimkernels import mask_from_noise
from mimkernels.testing import DEVICE, backends
from tests.known_answers import assert_same_masks

ELSEWHERE = {"cpu": ("cuda",), "cuda": ("cpu", "cuda-emulated")}[DEVICE]
HERE = [name for name in backends("mask_from_noise") if name not in ELSEWHERE]
KERNELS = [name for name in HERE if name != "reference"]


def published_masks(noise, keep):
    """MAE's random_masking, as the paper's algorithm states it."""
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    mask = torch.ones_like(noise)
    mask[:, :keep] = 0
    return ids_shuffle[:, :keep], ids_restore, mask.gather(1, ids_restore)


@pytest.mark.parametrize("tokens", [1, 2, 17, 49, 196, 197, 256, 257, 1024])
@pytest.mark.parametrize("backend", HERE)
def test_mask_from_noise_equals_the_published_code(backend, tokens, poisoned):
    draws = torch.rand(3, tokens, generator=torch.Generator().manual_seed(tokens)).to(DEVICE)
    keep = max(1, tokens // 4)
    got = mask_from_noise(draws, keep, backend=backend)
    ids_keep, ids_restore, mask = published_masks(draws, keep)
    assert torch.equal(got.ids_keep, ids_keep)
    assert torch.equal(got.ids_restore, ids_restore)
    assert torch.equal(got.mask, mask)


@pytest.mark.parametrize("order", ["shuffle", "sorted"])
@pytest.mark.parametrize("backend", KERNELS)
def test_ties_zeros_and_nan_order_as_a_stable_argsort(backend, order):
    draws = torch.tensor([[0.5, 0.5, -0.0, 0.0, float("nan"), float("inf"), -float("inf"), 0.5, -1.0, 1e-45]])
    draws = torch.cat([draws, draws.flip(1), -draws, torch.zeros_like(draws)]).to(DEVICE)
    expected = mask_from_noise(draws, 4, order=order, backend="reference")
    assert_same_masks(mask_from_noise(draws, 4, order=order, backend=backend), expected)


@pytest.mark.parametrize("backend", HERE)
def test_sorted_order_keeps_the_same_tokens_in_ascending_order(backend):
    draws = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    shuffled = mask_from_noise(draws, 11, backend=backend)
    ordered = mask_from_noise(draws, 11, order="sorted", backend=backend)
    assert torch.equal(ordered.ids_keep, shuffled.ids_keep.sort(1).values)
    assert torch.equal(ordered.ids_masked, shuffled.ids_masked.sort(1).values)
    assert torch.equal(ordered.mask, shuffled.mask)
    both = torch.cat([ordered.ids_keep, ordered.ids_masked], 1)
    assert torch.equal(both.gather(1, ordered.ids_restore), torch.arange(40, device=DEVICE).expand(5, -1))


@pytest.mark.parametrize("backend", HERE)
def test_strided_and_half_precision_noise(backend):
    draws = torch.rand(40, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE).t()
    assert_same_masks(mask_from_noise(draws, 9, backend=backend), mask_from_noise(draws.contiguous(), 9))
    half = draws.to(torch.bfloat16)
    assert_same_masks(mask_from_noise(half, 9, backend=backend), mask_from_noise(half.float(), 9))


def test_mask_from_noise_refuses():
    with pytest.raises(ValueError, match=r"noise must have 2 dimensions, got 1 \(\[4\]\)"):
        mask_from_noise(torch.rand(4), 2)
    with pytest.raises(TypeError, match="noise must be a floating-point tensor, got torch.int64"):
        mask_from_noise(torch.zeros(2, 4, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="keep is 5 but there are only 4 tokens"):
        mask_from_noise(torch.rand(2, 4), 5)
    with pytest.raises(TypeError, match="keep must be an int, got float"):
        mask_from_noise(torch.rand(2, 4), 2.0)
    with pytest.raises(ValueError, match="order must be 'shuffle' or 'sorted', got 'random'"):
        mask_from_noise(torch.rand(2, 4), 2, order="random")
