"""bias_gelu beside the contract: known values, tails, infinities, the order of sums, refusals of nothing."""

import math

import pytest
import torch
import torch.nn.functional as F

import mimkernels as mk
from mimkernels.ops._registry import BACKENDS, backend_state
from mimkernels.testing import DEVICE
from tests.cases import cases

HERE = [name for name in ("cpu", "triton", "cuda", "cuda-emulated") if name in BACKENDS and backend_state(name) is None]
HERE = [name for name in HERE if BACKENDS[name].runs_on(DEVICE, named=True)]
KINDS = ("none", "tanh")
INF = float("inf")


def on_device(values):
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def exact(x, approximate="none"):
    """GELU and its derivative in fp64, without the cancellation of 1 + erf; by functions of one number."""
    value, slope = [], []
    for v in x.double().tolist():
        if approximate == "none":
            mass = 0.5 * math.erfc(-v / math.sqrt(2))
            density = math.exp(-v * v / 2) / math.sqrt(2 * math.pi)
        else:
            twice = 2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)
            mass = 1 / (1 + math.exp(-twice))
            density = mass / (1 + math.exp(twice)) * 2 * math.sqrt(2 / math.pi) * (1 + 0.134145 * v * v)
        value.append(v * mass)
        slope.append(mass + v * density)
    return torch.tensor(value, dtype=torch.float64), torch.tensor(slope, dtype=torch.float64)


def value_and_slope(x, backend, approximate="none", bias=None):
    x = x.clone().requires_grad_()
    out = mk.bias_gelu(x, bias, approximate=approximate, backend=backend)
    return out.detach(), torch.autograd.grad(out.sum(), x)[0]


@pytest.mark.parametrize("backend", HERE)
def test_known_values(backend):
    # x times the normal distribution function: of 1 from the table of the normal distribution
    got, slope = value_and_slope(on_device([0.0, 1.0, -1.0, 3.0]), backend, bias=on_device([0.0, 0.0, 0.0, -3.0]))
    expected = torch.tensor([0.0, 0.8413447, -0.1586553, 0.0])
    torch.testing.assert_close(got.cpu(), expected, rtol=2e-6, atol=1e-7)
    density = math.exp(-0.5) / math.sqrt(2 * math.pi)
    expected = torch.tensor([0.5, 0.8413447 + density, 0.1586553 - density, 0.5])
    torch.testing.assert_close(slope.cpu(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("approximate", KINDS)
@pytest.mark.parametrize("backend", HERE)
def test_the_whole_line_to_the_last_places(backend, approximate):
    x = torch.linspace(-12, 12, 4801)
    value, slope = (t.cpu().double() for t in value_and_slope(x.to(DEVICE), backend, approximate))
    expected, expected_slope = exact(x, approximate)
    torch.testing.assert_close(slope, expected_slope, rtol=0, atol=4e-7)
    # Where GELU is not small: within eight units in the last place.
    upper = x > -1
    torch.testing.assert_close(value[upper], expected[upper], rtol=8 * 2.0**-23, atol=0)


@pytest.mark.parametrize("approximate", KINDS)
@pytest.mark.parametrize("backend", HERE)
def test_tails_keep_their_relative_accuracy(backend, approximate):
    x = torch.linspace(-5, -1, 401)
    (value, _), (expected, _) = value_and_slope(x.to(DEVICE), backend, approximate), exact(x, approximate)
    assert ((value.cpu() - expected) / expected).abs().max() < 1e-5
    plain = F.gelu(x, approximate=approximate)
    assert ((plain - expected) / expected).abs().max() > 1e-5  # what the plain expression does not do


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("approximate", KINDS)
@pytest.mark.parametrize("backend", HERE)
def test_numbers_of_16_bits_are_rounded_once(backend, approximate, dtype):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)  # all numbers of the type
    x = x[x.abs() < 13][::5]
    got = mk.bias_gelu(x.to(DEVICE), approximate=approximate, backend=backend).cpu().double()
    expected, _ = exact(x, approximate)
    half_a_place = torch.finfo(dtype).eps / 2
    # Half a unit in the last place after a relative 1e-5; in fp32, where kernels compute, 1e-36 may be nothing.
    nothing = max(torch.finfo(dtype).smallest_normal * half_a_place, 1e-36)
    assert ((got - expected).abs() <= (half_a_place + 1e-5) * expected.abs() + nothing).all()


@pytest.mark.parametrize("approximate", KINDS)
@pytest.mark.parametrize("backend", HERE)
def test_infinities_nan_and_huge_numbers_as_torch_s_exact_gelu(backend, approximate):
    x = on_device([INF, -INF, float("nan"), 1e20, -1e20, 3e38, -3e38, 14.0, -14.0, 1e-30, -1e-40])
    value, slope = value_and_slope(x, backend, approximate)
    wide = x.double().requires_grad_()
    expected = F.gelu(wide, approximate=approximate)
    (expected_slope,) = torch.autograd.grad(expected.sum(), wide)
    assert expected.isnan().tolist()[:3] == [False, True, True]
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-6, atol=1e-37, equal_nan=True)
    torch.testing.assert_close(slope.double(), expected_slope, rtol=1e-6, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("backend", HERE)
def test_zero_keeps_its_sign_without_a_bias(backend):
    out = mk.bias_gelu(on_device([0.0, -0.0]), backend=backend)
    assert torch.signbit(out).tolist() == [False, True]


@pytest.mark.parametrize("backend", HERE)
def test_the_bias_is_summed_over_every_row_and_in_its_own_dtype(backend):
    x = torch.randn(3, 70, 24, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)).bfloat16()
    bias = torch.linspace(-1, 1, 24, device=DEVICE).requires_grad_()
    (dbias,) = torch.autograd.grad(mk.bias_gelu(x, bias, backend=backend).sum(), bias)
    wide = bias.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(F.gelu(x.double() + wide).sum(), wide)
    assert dbias.dtype == torch.float32
    torch.testing.assert_close(dbias.double(), expected, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("backend", HERE)
def test_only_the_gradients_asked_for(backend):
    x, bias = torch.randn(2, 9, 16, device=DEVICE), torch.randn(16, device=DEVICE)
    both = [t.clone().requires_grad_() for t in (x, bias)]
    expected = torch.autograd.grad(mk.bias_gelu(*both, backend=backend).square().sum(), both)
    for i, leaf in enumerate(both):
        given = [x, bias]
        given[i] = leaf
        (grad,) = torch.autograd.grad(mk.bias_gelu(*given, backend=backend).square().sum(), leaf)
        assert torch.equal(grad, expected[i])


def test_number_of_threads_changes_no_bit():
    before, made = torch.get_num_threads(), []
    x, bias = torch.randn(777, 83), torch.randn(83)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
            out = mk.bias_gelu(*leaves, backend="cpu" if DEVICE == "cpu" else "auto")
            made.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    finally:
        torch.set_num_threads(before)
    for others in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, made[0], strict=True))


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_past_the_cache_are_the_same(dtype):
    rows, columns = 2100, 1024  # 8 MiB in fp32: streamed; halves of it are not
    x = torch.randn(rows * (4 // dtype.itemsize), columns).to(dtype)
    bias, grad = torch.randn(columns).to(dtype), torch.randn_like(x)
    whole, parts = [], []
    for given in ((x, grad), *zip(x.chunk(3), grad.chunk(3), strict=True)):
        leaf = given[0].clone().requires_grad_()
        out = mk.bias_gelu(leaf, bias, backend="cpu")
        made = (out.detach(), torch.autograd.grad(out, leaf, given[1])[0])
        (whole if given[0] is x else parts).append(made)
    for i in range(2):
        assert torch.equal(whole[0][i], torch.cat([part[i] for part in parts]))


def test_there_is_a_case_with_a_parameter_in_fp32():
    kinds = {str(case): case for case in cases("bias_gelu")}
    inputs = kinds["bias_gelu-fp32-bias"].inputs(torch.bfloat16)
    assert inputs["x"].dtype == torch.bfloat16 and inputs["bias"].dtype == torch.float32
