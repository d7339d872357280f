"""random_mask, and what holds for it and mask_from_noise together: integers that are exactly right everywhere."""

import pytest
import torch

from mimkernels import mask_from_noise, random_mask
from mimkernels.ops._registry import SPECS
from mimkernels.ops.random_mask.reference import noise, philox4x32
from mimkernels.testing import DEVICE, backends
from tests.known_answers import assert_same_masks

ELSEWHERE = {"cpu": ("cuda",), "cuda": ("cpu", "cuda-emulated")}[DEVICE]
HERE = [name for name in backends("random_mask") if name not in ELSEWHERE]
KERNELS = [name for name in HERE if name != "reference"]


def words(counter, key):
    return [int(w) for w in philox4x32([torch.tensor(c) for c in counter], key)]


def test_philox_gives_the_published_answers():
    ones = 0xFFFFFFFF
    assert words([0] * 4, (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words([ones] * 4, (ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert words(pi, (0xA4093822, 0x299F31D0)) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("order", ["shuffle", "sorted"])
@pytest.mark.parametrize(
    ("batch", "tokens", "keep", "seed", "offset"),
    [
        (3, 196, 49, 0, 0),
        (2, 17, 5, 2**62 + 12345, 2**40 + 7),
        (1, 1, 1, 1, 0),
        (4, 50, 50, 9, 3),
        (0, 8, 2, 1, 1),
    ],
)
@pytest.mark.parametrize("backend", KERNELS)
def test_random_mask_is_the_same_everywhere(backend, batch, tokens, keep, seed, offset, order, poisoned):
    options = {"order": order, "device": DEVICE}
    expected = random_mask(batch, tokens, keep, seed, offset, backend="reference", **options)
    assert_same_masks(random_mask(batch, tokens, keep, seed, offset, backend=backend, **options), expected)


@pytest.mark.parametrize("backend", HERE)
def test_random_mask_has_known_integers(backend):
    # Written down once from the definition; a change would change every training run.
    got = random_mask(2, 10, 4, seed=7, offset=3, device=DEVICE, backend=backend)
    assert got.ids_keep.tolist() == [[6, 1, 2, 8], [1, 2, 4, 7]]
    assert got.ids_masked.tolist() == [[5, 7, 4, 0, 3, 9], [8, 3, 6, 5, 9, 0]]


@pytest.mark.parametrize("backend", HERE)
def test_an_offset_tensor_draws_as_the_integer_does(backend):
    step = torch.tensor(5, device=DEVICE)
    expected = random_mask(2, 20, 5, seed=3, offset=5, device=DEVICE, backend=backend)
    assert_same_masks(random_mask(2, 20, 5, seed=3, offset=step, backend=backend), expected)
    assert_same_masks(random_mask(2, 20, 5, 3, step - 5 + 5, backend=backend), expected)


def test_masks_change_with_seed_offset_and_image():
    a = random_mask(2, 196, 49, seed=1, offset=0).ids_keep
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a, random_mask(2, 196, 49, seed=2, offset=0).ids_keep)
    assert not torch.equal(a, random_mask(2, 196, 49, seed=1, offset=1).ids_keep)


def test_every_token_is_kept_equally_often():
    kept = 1 - random_mask(4000, 32, 8, seed=11).mask
    frequency = kept.mean(0)
    assert kept.sum(1).eq(8).all()
    assert (frequency - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5


def test_noise_is_uniform():
    draws = noise(1, 2, None, 64, 1000, torch.device("cpu")).double() / 2**32
    assert abs(draws.mean().item() - 0.5) < 0.005
    assert abs(draws.var().item() - 1 / 12) < 0.002


@pytest.mark.parametrize("order", ["shuffle", "sorted"])
@pytest.mark.parametrize(
    ("backend", "tokens"),
    [
        (backend, tokens)
        for backend in ("auto", *KERNELS)
        for tokens in (2049, 5000)
        if backend != "triton" and (backend != "cuda-emulated" or tokens == 2049)
    ],
)
def test_long_rows(backend, tokens, order):
    draws = torch.rand(2, tokens, device=DEVICE)
    expected = mask_from_noise(draws, 100, order=order, backend="reference")
    assert_same_masks(mask_from_noise(draws, 100, order=order, backend=backend), expected)
    options = {"seed": 1, "order": order, "device": DEVICE}
    expected = random_mask(2, tokens, 100, backend="reference", **options)
    assert_same_masks(random_mask(2, tokens, 100, backend=backend, **options), expected)


@pytest.mark.parametrize(
    ("backend", "most"),
    [(name, most) for name, most in (("triton", 2048), ("cuda", 8192), ("cuda-emulated", 8192)) if name in HERE],
)
def test_quadratic_kernels_refuse_longer_rows(backend, most):
    with pytest.raises(NotImplementedError, match=f"{backend}: takes at most {most} tokens, got {most + 1}"):
        random_mask(2, most + 1, 100, seed=1, device=DEVICE, backend=backend)
    assert random_mask(2, most + 1, 100, seed=1, device=DEVICE).mask.sum().item() == 2 * (most + 1 - 100)


@pytest.mark.parametrize("backend", HERE)
def test_compiles_without_a_break(backend):
    torch._dynamo.reset()

    def step(draws, offset):
        made = mask_from_noise(draws, 5, backend=backend)
        drawn = random_mask(draws.shape[0], 20, 5, 3, offset, device=DEVICE, backend=backend)
        return made, drawn

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, offset in ((2, 4), (3, 5), (4, 6)):
        draws = torch.rand(batch, 20, device=DEVICE)
        for got, expected in zip(compiled(draws, offset), step(draws, offset), strict=True):
            assert_same_masks(got, expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend):
    draws = torch.rand(2, 20, device=DEVICE)
    torch.library.opcheck(SPECS["mask_from_noise"].overload("mask_from_noise_fwd", backend), (draws, 5, False))
    step = torch.tensor(3, device=DEVICE)
    for tensor in (None, step):
        arguments = (1, 2, tensor, 2, 20, 5, True, torch.device(DEVICE))
        torch.library.opcheck(SPECS["random_mask"].overload("random_mask_fwd", backend), arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 10, 0, 1), "keep must be at least 1, got 0"),
        ((2, 10, -3, 1), "keep must be at least 1, got -3"),
        ((2, 10, 11, 1), "keep is 11 but there are only 10 tokens"),
        ((-1, 10, 5, 1), "batch must not be negative, got -1"),
        ((2, 10, 5, -1), "seed must not be negative, got -1"),
        ((2, 10, 5, 2**63), "seed must be below 2\\^63"),
        ((2, 10, 5, 1, -2), "offset must not be negative, got -2"),
        ((2, 10, 5, 1, torch.zeros(2, dtype=torch.int64)), "offset tensor must be 0-d int64"),
    ],
)
def test_random_mask_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_mask(*arguments)
