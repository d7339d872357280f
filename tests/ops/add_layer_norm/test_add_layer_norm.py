"""add_layer_norm beside the contract: known values, rounding, rows far from 0, what is kept, the order of sums."""

import pytest
import torch
import torch.nn.functional as F

import mimkernels as mk
from mimkernels import testing
from mimkernels.ops._registry import BACKENDS, backend_state
from mimkernels.testing import DEVICE
from tests.cases import cases

KERNELS = [name for name in testing.backends("add_layer_norm") if name != "reference"]
HERE = [name for name in KERNELS if name in BACKENDS and backend_state(name) is None]
HERE = [name for name in HERE if BACKENDS[name].runs_on(DEVICE, named=True)]
AUTO = "cpu" if DEVICE == "cpu" else "auto"
BF16 = torch.bfloat16


def on_device(values):
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def drawn(*shape, seed=0):
    return torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed))


def exact_norm(x, eps=1e-5):
    return F.layer_norm(x.double(), x.shape[-1:], eps=eps)


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


@pytest.mark.parametrize("backend", HERE)
def test_known_values(backend):
    x, y = on_device([[1.0, 2.0, 3.0, 4.0]]), on_device([[2.0, 0.0, -2.0, 8.0]])
    # 1 + 2 * 0.5 * 2 and so on: 3, 2, 1, 12, with mean 4.5 and variance 19.25
    out = mk.add_layer_norm(
        x, y, on_device([1.0, 1.0, 2.0, 1.0]), on_device([0.0, 1.0, 0.0, 0.0]), scale=on_device([0.5] * 4),
        drop=on_device([2.0]), eps=1e-12, backend=backend,
    )  # fmt: skip
    assert out.residual.tolist() == [[3.0, 2.0, 1.0, 12.0]]
    deviation = 19.25**0.5
    expected = torch.tensor([[-1.5 / deviation, 1 - 2.5 / deviation, -7 / deviation, 7.5 / deviation]])
    torch.testing.assert_close(out.normalised.cpu(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", HERE)
def test_without_a_branch_the_residual_is_the_stream_itself(backend):
    x = drawn(2, 5, 24)
    out = mk.add_layer_norm(x, None, backend=backend)
    assert out.residual is x
    torch.testing.assert_close(out.normalised.double(), exact_norm(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, BF16), (BF16, BF16)])
@pytest.mark.parametrize("backend", HERE)
def test_a_plain_sum_has_the_bits_of_torch_s(backend, dtypes):
    x, y = drawn(3, 17, 45).to(dtypes[0]), drawn(3, 17, 45, seed=1).to(dtypes[1])
    assert torch.equal(mk.add_layer_norm(x, y, backend=backend).residual, x + y)


@pytest.mark.parametrize("backend", HERE)
def test_the_residual_is_rounded_before_it_is_normalised(backend):
    x = torch.where(drawn(1, 4, 64) > 0, 256.0, 258.0).to(BF16)
    y = drawn(1, 4, 64, seed=1).mul(0.9).clamp(-0.9, 0.9).to(BF16)  # lost in bf16 beside x
    out = mk.add_layer_norm(x, y, out_dtype=torch.float32, backend=backend)
    assert torch.equal(out.residual, x + y)
    torch.testing.assert_close(out.normalised.double(), exact_norm(x + y), rtol=1e-5, atol=1e-5)
    assert (exact_norm(x.double() + y) - exact_norm(x + y)).abs().max() > 0.1


@pytest.mark.parametrize("backend", HERE)
def test_rows_of_one_number_leave_the_bias(backend):
    values = on_device([0.1, -1e6 / 3, 3e4 + 0.1, 1e-30, 7e8])
    for columns in (1, 3, 48, 77):
        x = values[:, None].expand(-1, columns)
        weight, bias = drawn(columns), drawn(columns, seed=1)
        out = mk.add_layer_norm(x, torch.zeros_like(x), weight, bias, backend=backend)
        assert torch.equal(out.normalised, bias.expand(5, -1))


@pytest.mark.parametrize("offset", [1e2, -1e4, 1e6])
@pytest.mark.parametrize("backend", HERE)
def test_rows_far_from_zero_lose_no_more_than_the_rounding_of_their_mean(backend, offset):
    x = drawn(2, 9, 768) + offset
    allowed = 3e-6 + 1.1 * 2**-24 * abs(offset)  # half a unit in the last place of the mean of rows of deviation 0.93
    out = mk.add_layer_norm(x, None, backend=backend)
    assert (out.normalised.double() - exact_norm(x)).abs().max() < allowed
    # The weight's gradient is a sum of normalised numbers.
    weight = torch.ones(768, device=DEVICE, requires_grad=True)
    (dweight,) = torch.autograd.grad(mk.add_layer_norm(x, None, weight, backend=backend).normalised.sum(), weight)
    assert (dweight.double() - exact_norm(x).sum((0, 1))).abs().max() < 18 * allowed


@pytest.mark.parametrize("backend", HERE)
def test_a_dropped_branch_changes_nothing_and_learns_nothing(backend):
    x, y, scale = leaf(drawn(3, 5, 24)), leaf(drawn(3, 5, 24, seed=1)), leaf(drawn(24, seed=2))
    drop = on_device([0.0, 1.25, 0.0])
    out = mk.add_layer_norm(x, y, scale=scale, drop=drop, backend=backend)
    assert torch.equal(out.residual[::2], x[::2])
    dy, dscale = torch.autograd.grad(out.normalised.square().sum() + out.residual.sum(), (y, scale))
    assert not dy[::2].any() and dy[1].all()
    one = mk.add_layer_norm(x[1:2], y[1:2], scale=scale, drop=drop[1:2], backend=backend)
    (expected,) = torch.autograd.grad(one.normalised.square().sum() + one.residual.sum(), scale)
    torch.testing.assert_close(dscale, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", HERE)
def test_nan_and_infinity_stay_in_their_row(backend):
    x = drawn(2, 4, 40)
    plain = mk.add_layer_norm(x, x, backend=backend)
    for value in (float("nan"), float("inf")):
        spoiled = x.clone()
        spoiled[1, 2, 3] = value
        out = mk.add_layer_norm(spoiled, x, backend=backend)
        wrong = torch.zeros(2, 4, dtype=torch.bool, device=DEVICE)
        wrong[1, 2] = True
        assert out.normalised[wrong].isnan().all()
        assert torch.equal(out.normalised[~wrong], plain.normalised[~wrong])


def tensors(columns=24):
    """The tensors of a call with everything, by name."""
    x, y = drawn(2, 9, columns), drawn(2, 9, columns, seed=1)
    rows = {name: 1 + 0.5 * drawn(columns, seed=seed) for seed, name in enumerate(("weight", "bias", "scale"), 2)}
    return {"x": x, "y": y, **rows}


@pytest.mark.parametrize("upstream", ["both", "residual", "normalised"])
@pytest.mark.parametrize("backend", HERE)
def test_only_the_gradients_asked_for(backend, upstream):
    drop = on_device([1.25, 0.5])

    def gradients(*names):
        given = {name: leaf(t) if name in names else t for name, t in tensors().items()}
        out = mk.add_layer_norm(**given, drop=drop, backend=backend)
        used = [out.residual, out.normalised] if upstream == "both" else [getattr(out, upstream)]
        used = [t for t in used if t.requires_grad]
        if not used:
            return [torch.zeros_like(given[name]) for name in names]
        loss = sum(t.square().sum() for t in used)
        return torch.autograd.grad(loss, [given[name] for name in names], materialize_grads=True)

    names = tuple(tensors())
    everything = gradients(*names)
    for name, expected in zip(names, everything, strict=True):
        assert torch.equal(gradients(name)[0], expected), name


@pytest.mark.parametrize("backend", HERE)
def test_the_branch_of_a_plain_sum_gets_a_gradient_of_its_own(backend):
    x, y = leaf(drawn(2, 5, 16)), leaf(drawn(2, 5, 16, seed=1))
    out = mk.add_layer_norm(x, y, backend=backend)
    (out.normalised.square().sum() + out.residual.sum()).backward()
    assert torch.equal(x.grad, y.grad)
    x.grad.zero_()
    assert y.grad.all()


@pytest.mark.parametrize("backend", HERE)
def test_the_branch_is_kept_for_the_gradient_of_scale_alone(backend):
    def kept(*names):
        given = {name: leaf(t) if name in names else t for name, t in tensors(64).items()}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            mk.add_layer_norm(**given, backend=backend)
        return sum(t.numel() for t in saved)

    rows, statistics = 2 * 9 * 64, 2 * 2 * 9
    assert kept("x", "y", "weight", "bias") == rows + statistics + 2 * 64
    assert kept("x", "y", "weight", "bias", "scale") == 2 * rows + statistics + 2 * 64


@pytest.mark.parametrize("backend", HERE)
def test_parameters_of_any_dtype_get_gradients_in_it(backend):
    x, y = drawn(2, 9, 24).to(BF16), drawn(2, 9, 24, seed=1).to(BF16)
    half, single = (drawn(24, seed=2).to(dtype).requires_grad_() for dtype in (BF16, torch.float32))
    scale = drawn(24, seed=3).half().requires_grad_()
    out = mk.add_layer_norm(x, y, half, single, scale=scale, backend=backend)
    grads = torch.autograd.grad(out.normalised.sum() + out.residual.sum(), (half, single, scale))
    assert [grad.dtype for grad in grads] == [BF16, torch.float32, torch.float16]


def test_number_of_threads_changes_no_bit():
    before, made = torch.get_num_threads(), []
    x, y = torch.randn(7, 111, 83), torch.randn(7, 111, 83)
    weight, bias, scale = torch.randn(3, 83)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaves = [leaf(t) for t in (x, y, weight, bias, scale)]
            drop = torch.arange(7) % 3 * 0.625
            out = mk.add_layer_norm(*leaves[:4], scale=leaves[4], drop=drop, backend=AUTO)
            loss = out.normalised.square().sum() + out.residual.sum()
            made.append((*(t.detach() for t in out), *torch.autograd.grad(loss, leaves)))
    finally:
        torch.set_num_threads(before)
    for others in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, made[0], strict=True))


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU kernels")
@pytest.mark.parametrize("columns", [1024, 4352])  # of 4352, a row is longer than what is kept of it
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, BF16), (BF16, BF16)])
def test_outputs_past_the_cache_are_the_same(dtypes, columns):
    dtype, branch_dtype = dtypes
    rows = (9 << 20) // (branch_dtype.itemsize * columns)  # every output is streamed; thirds of it are not
    x, y = torch.randn(rows, columns).to(dtype), torch.randn(rows, columns).to(branch_dtype)
    weight, bias, scale = torch.randn(3, columns)
    upstream = torch.randn_like(x), torch.randn_like(y)
    whole, parts = [], []
    for given in ((x, y, *upstream), *zip(*(t.chunk(4) for t in (x, y, *upstream)), strict=True)):
        leaves = [leaf(t) for t in given[:2]]
        out = mk.add_layer_norm(*leaves, weight, bias, scale=scale, out_dtype=branch_dtype, backend="cpu")
        made = (*(t.detach() for t in out), *torch.autograd.grad(tuple(out), leaves, given[2:]))
        (whole if given[0] is x else parts).append(made)
    for i in range(4):
        assert torch.equal(whole[0][i], torch.cat([part[i] for part in parts]))


def test_there_is_a_case_as_under_autocast():
    kinds = {str(case): case for case in cases("add_layer_norm")}
    inputs = kinds["add_layer_norm-autocast-bf16"].inputs(BF16)
    assert [inputs[name].dtype for name in ("x", "weight", "y")] == [torch.float32, torch.float32, BF16]
    assert inputs["out_dtype"] == BF16
