"""Known answers of masked_patch_loss."""

import pytest
import torch

import mimkernels
from mimkernels import testing
from mimkernels.ops._registry import BACKENDS

HERE = [name for name in testing.backends("masked_patch_loss") if BACKENDS[name].runs_on(testing.DEVICE, named=True)]


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["mse", "l1", "smooth_l1"])
def test_a_patch_that_does_not_count_changes_nothing_whatever_it_holds(kind, value, backend, device):
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(1, 4, 12, generator=generator).to(device)
    images = torch.rand(1, 3, 4, 4, generator=generator).to(device)
    mask = torch.tensor([[True, False, False, True]], device=device)

    def loss_and_gradient(pred, images):
        pred = pred.clone().requires_grad_()
        loss = mimkernels.masked_patch_loss(pred, images, mask=mask, patch_size=2, kind=kind, backend=backend)
        loss.backward()
        return loss.detach(), pred.grad

    plain = loss_and_gradient(pred, images)
    pred[0, 1, 0] = value  # the upper right patch
    images[0, 0, 3, 0] = value  # the lower left one
    for got, expected in zip(loss_and_gradient(pred, images), plain, strict=True):
        assert torch.equal(got, expected)
    assert not plain[1][0, 1:3].any()
