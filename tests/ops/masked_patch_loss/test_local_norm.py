"""Known answers of targets normalised by a box around each pixel, and of masks finer than the patches."""

import math

import pytest
import torch

import mimkernels
from mimkernels import testing
from mimkernels.ops._registry import BACKENDS

HERE = [name for name in testing.backends("masked_patch_loss") if BACKENDS[name].runs_on(testing.DEVICE, named=True)]

pytestmark = pytest.mark.parametrize("backend", HERE)


def targets(images, size, backend, patch=(1, 1), **options):
    """``[B, C, H, W]``: minus half the slope of the squared error at 0 is the target."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch[0], width // patch[1]
    pred = torch.zeros(batch, rows * columns, channels * patch[0] * patch[1], device=images.device, requires_grad=True)
    options = {"patch_size": patch, "local_norm": size, "layout": "channels_first", "reduction": "none", **options}
    mask = torch.ones(batch, rows * columns, dtype=torch.bool, device=images.device)
    loss = mimkernels.masked_patch_loss(pred, images, mask=mask, **options, backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), pred)
    patches = (grad * pred.shape[2] / -2).unflatten(2, (channels, *patch)).unflatten(1, (rows, columns))
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


@pytest.mark.parametrize("value", [0.3, -1000.7])
def test_a_constant_image_has_targets_of_zero(value, backend, device):
    images = torch.full((1, 2, 6, 10), value, device=device)
    assert not targets(images, 5, backend, (3, 5)).any()


def test_a_box_wider_than_the_image_takes_the_whole_image(backend, device):
    images = torch.rand(1, 2, 4, 9, generator=torch.Generator().manual_seed(0)).to(device)
    exact = images.double()
    deviation = (exact.var((2, 3), keepdim=True) + 1e-6).sqrt()
    wanted = ((exact - exact.mean((2, 3), keepdim=True)) / deviation).float()
    for size in (17, 2**40 + 1):
        torch.testing.assert_close(targets(images, size, backend, (4, 3)), wanted, atol=1e-6, rtol=1e-6)


def test_pixels_of_the_corner_edge_and_middle_by_hand(backend, device):
    images = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 0.0], [7.0, 9.0, 8.0]], device=device)[None, None]
    got = targets(images, 3, backend)[0, 0]
    # Corner: 1, 2, 3, 5 with mean 11/4 and squares of 39. Edge: 1, 2, 4, 3, 5, 0, mean 5/2, squares of 55.
    corner = (1 - 11 / 4) / math.sqrt((39 - 4 * (11 / 4) ** 2) / 3 + 1e-6)
    edge = (2 - 5 / 2) / math.sqrt((55 - 6 * (5 / 2) ** 2) / 5 + 1e-6)
    middle = (5 - 39 / 9) / math.sqrt((249 - 9 * (39 / 9) ** 2) / 8 + 1e-6)
    expected = torch.tensor([corner, edge, middle])
    torch.testing.assert_close(torch.stack([got[0, 0], got[0, 1], got[1, 1]]).cpu(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e15])
def test_a_pixel_is_felt_in_the_boxes_that_hold_it_alone(value, backend, device):
    images = torch.rand(1, 1, 12, 14, generator=torch.Generator().manual_seed(0)).to(device)
    plain = targets(images, 5, backend, (6, 7))
    images[0, 0, 4, 6] = value
    spoiled = targets(images, 5, backend, (6, 7))
    inside = torch.zeros(12, 14, dtype=torch.bool, device=device)
    inside[2:7, 4:9] = True
    assert torch.equal(spoiled[0, 0][~inside], plain[0, 0][~inside])
    changed = spoiled[0, 0][inside]
    assert changed.isfinite().all() if math.isfinite(value) else changed.isnan().all()


@pytest.mark.parametrize("kind", ["mse", "l1", "smooth_l1"])
@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_of_a_finer_mask_its_pixels_count(kind, layout, backend, device):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 8, 12, generator=generator).to(device)
    pred = torch.randn(2, 4, 3 * 4 * 6, generator=generator).to(device)
    cells = torch.rand(2, 4, 6, generator=generator).to(device) < 0.5  # of 2 x 2 pixels, 2 x 3 in a patch
    cells[0, :2, :3] = False  # the first patch
    pixels = cells.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    wide = pred.unflatten(2, (3, 4, 6) if layout == "channels_first" else (4, 6, 3)).unflatten(1, (2, 2))
    wide = wide.permute(0, 3, 1, 4, 2, 5) if layout == "channels_first" else wide.permute(0, 5, 1, 3, 2, 4)
    distance = getattr(torch.nn.functional, {"mse": "mse_loss"}.get(kind, f"{kind}_loss"))
    error = distance(wide.reshape(images.shape).double(), images.double(), reduction="none") * pixels
    options = {"mask": cells, "patch_size": (4, 6), "kind": kind, "layout": layout, "backend": backend}
    loss = mimkernels.masked_patch_loss(pred, images, **options)
    torch.testing.assert_close(loss.double(), error.sum() / pixels.sum() / 3)
    each = mimkernels.masked_patch_loss(pred, images, **options, reduction="none")
    patches = [value.unflatten(2, (2, 4)).unflatten(4, (2, 6)).sum((1, 3, 5)).flatten(1) for value in (error, pixels)]
    torch.testing.assert_close(each.double(), torch.where(patches[1] > 0, patches[0] / patches[1] / 3, 0.0))
    assert each[0, 0] == 0


def test_a_pixel_that_does_not_count_changes_nothing_whatever_it_holds(backend, device):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 1, 4, 4, generator=generator).to(device)
    pred = torch.randn(1, 1, 16, generator=generator).to(device)
    cells = torch.tensor([[[True, False], [False, True]]], device=device)

    def loss_and_gradient():
        leaf = pred.clone().requires_grad_()
        loss = mimkernels.masked_patch_loss(leaf, images, mask=cells, patch_size=4, backend=backend)
        loss.backward()
        return loss.detach(), leaf.grad

    plain = loss_and_gradient()
    pred[0, 0, 2], images[0, 0, 3, 0] = math.nan, math.inf
    for got, expected in zip(loss_and_gradient(), plain, strict=True):
        assert torch.equal(got, expected)
    assert not plain[1].view(4, 4)[:2, 2:].any() and plain[1].view(4, 4)[:2, :2].all()


def test_a_finer_mask_of_whole_patches_is_the_mask_of_patches(backend, device):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 8, 8, generator=generator).to(device)
    pred = torch.randn(2, 4, 48, generator=generator).to(device)
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]], device=device)
    cells = mask.unflatten(1, (2, 2)).repeat_interleave(2, 1).repeat_interleave(4, 2)
    options = {"patch_size": 4, "norm_pix": True, "backend": backend}
    whole, fine = (mimkernels.masked_patch_loss(pred, images, mask=m, **options) for m in (mask, cells))
    torch.testing.assert_close(fine, whole)


def test_one_graph_for_all_shapes(backend, device):
    def both(pred, images, mask, cells):
        options = {"patch_size": 4, "backend": backend}
        whole = mimkernels.masked_patch_loss(pred, images, mask=mask, local_norm=5, **options)
        return whole + mimkernels.masked_patch_loss(pred, images, mask=cells, kind="l1", **options)

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, rows, columns in ((2, 1, 2), (1, 2, 3)):
        generator = torch.Generator().manual_seed(batch)
        pred = torch.randn(batch, rows * columns, 16, generator=generator).to(device).requires_grad_()
        images = torch.rand(batch, 1, 4 * rows, 4 * columns, generator=generator).to(device)
        mask = torch.rand(batch, rows * columns, generator=generator).to(device) < 0.9
        cells = torch.rand(batch, 2 * rows, 4 * columns, generator=generator).to(device) < 0.5
        losses = [run(pred, images, mask, cells) for run in (compiled, both)]
        slopes = [torch.autograd.grad(loss, pred)[0] for loss in losses]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*slopes)
