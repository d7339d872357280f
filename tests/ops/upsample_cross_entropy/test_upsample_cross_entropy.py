"""upsample_cross_entropy beside the contract: torch's two functions, nothing counted, wrong labels, threads, memory."""

import pytest
import torch
import torch.nn.functional as F

import mimkernels as mk
from mimkernels import testing
from mimkernels.ops._registry import BACKENDS, backend_state

OP = "upsample_cross_entropy"
HERE = [
    name
    for name in testing.backends(OP)
    if BACKENDS[name].runs_on(testing.DEVICE, named=True) and backend_state(name) is None
]


def random_call(device, classes=7, size=(3, 4), target=(9, 14), dtype=torch.int64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, *size, generator=generator).to(device).requires_grad_()
    labels = torch.randint(classes, (2, *target), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return logits, labels.to(dtype).to(device)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("align_corners", [False, True])
def test_loss_and_gradient_are_those_of_interpolate_and_cross_entropy(align_corners, backend, device):
    logits, labels = random_call(device)
    weight = torch.rand(7, generator=torch.Generator().manual_seed(1)).to(device)
    options = {"weight": weight, "label_smoothing": 0.2}
    loss = mk.upsample_cross_entropy(logits, labels, align_corners=align_corners, **options, backend=backend)
    full = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=align_corners)
    expected = F.cross_entropy(full, labels, ignore_index=255, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(one, logits)[0] for one in (loss, expected)))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integers(dtype, backend, device):
    logits, labels = random_call(device)
    losses = [mk.upsample_cross_entropy(logits, each, backend=backend) for each in (labels, labels.to(dtype))]
    assert torch.equal(*losses)


@pytest.mark.parametrize("backend", HERE)
def test_where_nothing_counts_the_loss_is_nan_and_the_gradient_zero(backend, device):
    logits, labels = random_call(device)
    loss = mk.upsample_cross_entropy(logits, torch.full_like(labels, 255), backend=backend)
    assert loss.isnan()
    assert not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("backend", [name for name in HERE if name != "reference"])  # torch multiplies by 0
def test_an_ignored_pixel_changes_nothing_whatever_lies_there(backend, device):
    logits, labels = random_call(device, target=(3, 4))
    labels[0, 1, 2] = 255
    spoiled = logits.detach().clone()
    spoiled[0, :, 1, 2] = float("nan")  # of the same size, a pixel has its own logits alone, the others with weight 0
    labels[0, 1, 1] = labels[0, 0, 2] = labels[0, 0, 1] = 255  # which meet them with that weight
    spoiled.requires_grad_()
    losses = [mk.upsample_cross_entropy(each, labels, backend=backend) for each in (logits, spoiled)]
    assert torch.equal(*losses)
    grads = [torch.autograd.grad(loss, each)[0] for loss, each in zip(losses, (logits, spoiled), strict=True)]
    assert torch.equal(grads[0], grads[1])


@pytest.mark.skipif(testing.DEVICE != "cpu", reason="labels on CUDA are checked with MIMKERNELS_DEBUG=1 alone")
@pytest.mark.parametrize("backend", [name for name in HERE if name != "cuda-emulated"])
@pytest.mark.parametrize("wrong", [-1, 7, 300])
def test_a_label_that_is_no_class_is_refused(wrong, backend):
    logits, labels = random_call("cpu")
    labels[1, 2, 3] = wrong
    with pytest.raises(IndexError, match=rf"{OP}: labels.* {wrong}\b.*\[0, 7\)"):
        mk.upsample_cross_entropy(logits, labels, backend=backend)
    assert mk.upsample_cross_entropy(logits, labels.masked_fill(labels == 255, wrong), ignore_index=wrong).isfinite()


def test_number_of_threads_changes_no_bit():
    before, made = torch.get_num_threads(), []
    logits, labels = random_call("cpu", classes=40, size=(7, 5), target=(50, 61))
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            loss = mk.upsample_cross_entropy(logits, labels, backend="cpu" if testing.DEVICE == "cpu" else "auto")
            made.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    finally:
        torch.set_num_threads(before)
    for others in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, made[0], strict=True))


def test_no_tensor_of_logits_has_the_size_of_the_labels(device):
    logits, labels = random_call(device, classes=30, size=(4, 4), target=(64, 64))
    loss = mk.upsample_cross_entropy(logits, labels, backend=HERE[0] if testing.DEVICE != "cpu" else "cpu")
    largest = 0
    for saved in getattr(loss.grad_fn, "saved_tensors", None) or ():
        largest = max(largest, 0 if saved is None else saved.numel())
    assert 0 < largest <= 2 * labels.numel()  # two numbers a pixel
