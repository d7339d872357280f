"""Known answers of masked_patch_loss, and what its oracle computes in."""

import pytest
import torch

import mimkernels
from mimkernels import testing
from mimkernels.ops import _checks
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


@pytest.mark.parametrize("norm_pix", [False, True])
def test_the_oracle_has_targets_of_uint8_pixels_in_fp64(norm_pix, device):
    images = torch.randint(0, 256, (1, 2, 1, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = [0.31, 0.4], [0.33, 0.25]
    scale, shift = _checks.normalisation("masked_patch_loss", images, mean, std)
    target = images.double() * scale[:, None, None].double() + shift[:, None, None].double()
    target = target.reshape(1, 1, 16)
    pixels = mimkernels.patchify_gather(images, None, patch_size=(1, 8), mean=mean, std=std, dtype=torch.float64)
    torch.testing.assert_close(pixels, target, rtol=1e-14, atol=1e-14)
    if norm_pix:
        target = (target - target.mean()) / (target.var() + 1e-6).sqrt()

    pred = torch.zeros(1, 1, 16, dtype=torch.float64, device=device).requires_grad_()
    options = {"patch_size": (1, 8), "mean": mean, "std": std, "norm_pix": norm_pix, "layout": "channels_first"}
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    mimkernels.masked_patch_loss(pred, images.to(device), ids=ids, **options, backend="reference").backward()
    torch.testing.assert_close(pred.grad.cpu(), -target / 8, rtol=1e-14, atol=1e-14)
