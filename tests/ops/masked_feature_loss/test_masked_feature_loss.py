"""Facts of masked_feature_loss that the contract does not know."""

import pytest
import torch
from torch.nn import functional as F

import mimkernels as mk
from mimkernels import testing
from mimkernels.ops._registry import BACKENDS
from mimkernels.testing import DEVICE

HERE = [name for name in testing.backends("masked_feature_loss") if BACKENDS[name].runs_on(DEVICE, named=True)]


def loss_and_grad(pred, *arguments, **options):
    leaf = pred.detach().requires_grad_()
    loss = mk.masked_feature_loss(leaf, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("kind", ["mse", "l1", "smooth_l1", "cosine"])
def test_flat_ids_are_those_of_each_image(backend, kind, device):
    torch.manual_seed(0)
    target, pred = torch.randn(3, 7, 12, device=device), torch.randn(3, 4, 12, device=device)
    ids = torch.rand(3, 7, device=device).argsort(1)[:, :4]
    flat = (ids + 7 * torch.arange(3, device=device)[:, None]).flatten()
    options = {"kind": kind, "reduction": "none", "backend": backend}
    loss, grad = loss_and_grad(pred, target, ids, **options)
    same, same_grad = loss_and_grad(pred.flatten(0, 1), target, flat, **options)
    assert torch.equal(loss.flatten(), same) and torch.equal(grad.flatten(0, 1), same_grad)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("value", [0.0, 0.1, -1000.7])
def test_targets_of_equal_numbers_are_zero(backend, value, device):
    target = torch.full((1, 2, 50), value, device=device)
    pred = torch.ones(1, 2, 50, device=device)
    loss, grad = loss_and_grad(pred, target, kind="mse", backend=backend)
    assert loss == 1 and torch.equal(grad, torch.full_like(pred, 2 / 100))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("center", [0.0, 100.0])
def test_layer_norm_of_rows_wherever_they_lie(backend, center, device):
    torch.manual_seed(0)
    target = torch.randn(1, 4, 200, device=device) + center
    pred = torch.zeros(1, 4, 200, device=device)
    grad = loss_and_grad(pred, target, kind="mse", reduction="none", backend=backend)[1]
    exact = F.layer_norm(target.double(), (200,)).float()
    torch.testing.assert_close(grad * -100, exact, atol=1e-4 if center else 1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(("length", "loss"), [(0.0, 1.0), (5e-9, 0.5)])
def test_a_vanishing_vector_has_a_finite_slope(backend, length, loss, device):
    target = torch.tensor([[[3.0, 4.0]]], device=device)
    got, grad = loss_and_grad(target * (length / 5), target, norm="none", kind="cosine", backend=backend)
    torch.testing.assert_close(got, torch.tensor(loss, device=device))
    torch.testing.assert_close(grad, torch.tensor([[[-0.6e8, -0.8e8]]], device=device))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("beta", [1e-38, 1e-45])
def test_smooth_l1_of_a_vanishing_beta_is_l1(backend, beta, device):
    torch.manual_seed(0)
    pred, target = torch.randn(1, 3, 9, device=device), torch.randn(1, 3, 9, device=device)
    smooth = loss_and_grad(pred, target, beta=beta, backend=backend)
    for got, wanted in zip(smooth, loss_and_grad(pred, target, kind="l1", backend=backend), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", HERE)
def test_what_is_not_named_is_not_read(backend, device):
    target = torch.full((2, 5, 8), torch.nan, device=device)
    target[:, 2] = torch.arange(8.0, device=device)
    ids = torch.full((2, 1), 2, device=device)
    loss, grad = loss_and_grad(torch.zeros(2, 1, 8, device=device), target, ids, backend=backend)
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU kernels")
def test_bits_do_not_depend_on_threads_or_on_the_size_of_the_output():
    torch.manual_seed(0)
    rows, dim = 2100, 1024  # 8 MiB of gradients, which bypass the cache; parts of them do not
    pred, target = torch.randn(rows, dim), torch.randn(3, 900, dim).bfloat16()
    ids = torch.randint(2700, (rows,))
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append(loss_and_grad(pred, target, ids, reduction="none", backend="cpu"))
            made.append((mk.masked_feature_loss(pred, target, ids, backend="cpu"),))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(made[0] + made[1], made[2] + made[3], strict=True))
    parts = [loss_and_grad(pred[part], target, ids[part], reduction="none") for part in torch.arange(rows).chunk(3)]
    for whole, pieces in zip(made[0], zip(*parts, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(pieces))


def test_there_are_cases_of_two_dtypes():
    from tests.cases import cases

    dtypes = set()
    for case in cases("masked_feature_loss"):
        for dtype in case.dtypes:
            inputs = case.inputs(dtype)
            dtypes.add((inputs["pred"].dtype, inputs["target"].dtype))
    assert len(dtypes) >= 7


@pytest.mark.skipif(DEVICE != "cpu", reason="calls kernels that run in Triton's interpreter here")
@pytest.mark.parametrize("rows", [1, 1025, 8193, 70000])
def test_the_mean_of_the_triton_kernels_over_any_number_of_rows(rows):
    from mimkernels.ops.masked_feature_loss.triton import _mean

    values = torch.rand(rows, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_mean(values), values.double().mean().float(), atol=0, rtol=1e-6)


@pytest.mark.skipif(DEVICE != "cpu", reason="calls kernels that run in Triton's interpreter here")
@pytest.mark.parametrize("kind", range(4))
def test_ids_of_a_target_without_tokens_are_read_from_nowhere(kind, monkeypatch, poisoned):
    from mimkernels.ops import _triton
    from mimkernels.ops.masked_feature_loss.triton import masked_feature_loss_bwd, masked_feature_loss_fwd

    monkeypatch.setattr(_triton, "check_ids", lambda *_, **__: None)  # as on a GPU
    arguments = torch.ones(1, 2, 8), torch.empty(1, 0, 8), torch.zeros(1, 2, dtype=torch.int64), True, 1e-5, kind, 1.0
    assert torch.equal(masked_feature_loss_fwd(*arguments, False), torch.zeros(1, 2))
    assert torch.equal(masked_feature_loss_bwd(torch.ones(()), *arguments, True), torch.zeros(1, 2, 8))
