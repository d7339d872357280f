"""MAE with masks that are given: as many visible patches in every image, or different numbers of them."""

import pytest
import torch

pytest.importorskip("timm")
from mimkernels.data.masks import STRATEGIES, MaskSampler
from mimkernels.models import MAE
from tests.models.test_mae import SMALL, VARIANTS, batch, build

RAGGED = torch.tensor(
    [
        [[0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]],
        [[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]],
        [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    ],
    dtype=torch.bool,
)  # 3, 11, 1 and 16 visible


def with_gradients(model, images, **arguments):
    model.zero_grad()
    out = model(images, **arguments)
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(one, other):
    """To the rounding of fp32 sums in another order."""
    torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("full", [False, True])
def test_a_drawn_mask_that_is_given_changes_nothing(full):
    """As many visible patches in every image: the tokens are the same ones, in another order."""
    model = build()
    images, noise = batch(model)
    drawn, gradients = with_gradients(model, images, noise=noise, full_prediction=full)
    mask = drawn.mask.mask.bool().unflatten(1, model.grid_size)
    given, others = with_gradients(model, images, mask=mask, full_prediction=full)
    assert torch.equal(given.mask.mask, drawn.mask.mask)
    assert torch.equal(given.mask.ids_keep, drawn.mask.ids_keep.sort(1).values)
    assert_close(given.loss, drawn.loss)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert_close(others[name], gradient)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("computed_by", ["mimkernels", "timm"])
@pytest.mark.parametrize("variant", ["vit_tiny", "registers with positions", "no prefix", "pre-norm, no patch bias"])
def test_different_numbers_of_visible_patches_are_each_image_alone(variant, computed_by, checkpointing):
    model = build(**VARIANTS[variant], attention=computed_by, mlp=computed_by)
    model.set_grad_checkpointing(checkpointing)
    images, _ = batch(model, 4)
    together, gradients = with_gradients(model, images, mask=RAGGED, full_prediction=True)
    assert torch.equal(together.mask.mask, RAGGED.flatten(1).float())
    masked = RAGGED.flatten(1).sum(1)
    model.zero_grad()
    losses = []
    for image in range(3):  # nothing of the last one is masked
        alone = model(images[image : image + 1], mask=RAGGED[image : image + 1], full_prediction=True)
        assert_close(together.pred[image], alone.pred[0])
        share = masked[image] / masked.sum()
        (alone.loss * share).backward()
        losses.append(alone.loss.detach() * share)
    assert_close(together.loss, sum(losses))
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(gradients[name], parameter.grad)


def test_the_loss_needs_no_full_prediction():
    model = build()
    images, _ = batch(model, 4)
    assert torch.equal(model(images, mask=RAGGED).loss, model(images, mask=RAGGED, full_prediction=True).loss)
    assert model(images, mask=RAGGED).pred is None


@pytest.mark.parametrize("name", [name for name, kind in STRATEGIES.items() if kind.dims == 2])
def test_every_strategy_masks_images(name):
    model = build(img_size=112)
    sampler = MaskSampler(model.grid_size, name)
    scores = {"scores": torch.rand(6, 196)} if sampler.needs_scores else {}
    mask = sampler.sample(6, 0, **scores).mask
    images, _ = batch(model, 6)
    out, gradients = with_gradients(model, images, mask=mask)
    assert torch.equal(out.mask.mask.bool().unflatten(1, (14, 14)), mask)
    assert out.loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients.values())


def test_reconstructions_show_the_given_mask():
    model = build(mean=[0.5] * 3, std=[0.2] * 3)
    images = torch.randint(1, 256, (4, 3, 32, 32), dtype=torch.uint8)
    pictures = model.reconstruct(images, mask=RAGGED)
    visible = (pictures.masked == images / 255).all(1).unflatten(1, (4, 8)).unflatten(3, (4, 8)).all(4).all(2)
    assert torch.equal(visible, ~RAGGED)


def test_an_empty_batch():
    model = build()
    out = model(torch.randn(0, 3, 32, 32), mask=torch.zeros(0, 4, 4, dtype=torch.bool))
    drawn = model(torch.randn(0, 3, 32, 32))
    assert out.loss.isnan() == drawn.loss.isnan() and out.mask.mask.shape == (0, 16)


@pytest.mark.parametrize(
    "mask, error, message",
    [
        (RAGGED.float(), TypeError, r"mask must be a bool tensor \[4, 4, 4\], True = masked, got torch.float32"),
        (RAGGED.tolist(), TypeError, r"mask must be a bool tensor \[4, 4, 4\], True = masked, got list"),
        (RAGGED[:2], ValueError, r"mask must be \[4, 4, 4\], one value per image and patch, got \[2, 4, 4\]"),
        (RAGGED.flatten(1), ValueError, r"mask must be \[4, 4, 4\], .* got \[4, 16\]"),
        (RAGGED | RAGGED[2:3] | ~RAGGED[2:3], ValueError, "mask hides all of the 16 patches of image 0"),
        (RAGGED & ~RAGGED, ValueError, "mask hides none of the 16 patches of any of the 4 images"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, error, message):
    model = MAE.from_timm("vit_tiny_patch16_224", **SMALL)
    images, _ = batch(model, 4)
    with pytest.raises(error, match=message):
        model(images, mask=mask)


def test_what_goes_with_no_mask_is_refused():
    model = build()
    images, noise = batch(model, 4)
    with pytest.raises(ValueError, match="give mask or noise, got both"):
        model(images, mask=RAGGED, noise=noise)
    with pytest.raises(ValueError, match="head_stats needs masks that leave .* as many patches visible, got 1 to 16"):
        model(images, mask=RAGGED, head_stats=("entropy",))
    equal = MaskSampler((4, 4), "block_exact", count=7).sample(4, 0).mask
    out = model(images, mask=equal, head_stats=("entropy",))
    assert out.head_stats[0]["entropy"].shape == (4, 3, 10)
