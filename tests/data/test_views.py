"""Views of joint-embedding models: shapes, determinism, and what is random in which of them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from mimkernels.data.batches import AUGMENT, PretrainImages, derived_seed
from mimkernels.data.sources import open_source
from mimkernels.data.views import AsymmetricViews, ImageViews, MultiCrop, Strength, view_steps


def picture(side=40, channels=3):
    values = np.random.default_rng(0).integers(0, 256, (side, side + 8, channels), dtype=np.uint8)
    return Image.fromarray(values if channels == 3 else values[..., 0])


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("given", ["colour", "grey", "array"])
def test_two_views_of_any_image_are_the_same_bits_for_a_seed_and_others_for_another(in_chans, given):
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8) * 4 if given == "array" else picture()
    image = image.convert("L") if given == "grey" else image
    views = AsymmetricViews(28, in_chans, 0.08, hflip=True)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one, two = views(image, 3)
    assert torch.equal(torch.get_rng_state(), state)
    for view in (one, two):
        assert view.shape == (in_chans, 28, 28) and view.dtype == torch.uint8 and view.is_contiguous()
    assert not torch.equal(one, two)
    torch.manual_seed(8)
    assert all(map(torch.equal, views(image, 3), (one, two)))
    assert not torch.equal(views(image, 4)[0], one)


def test_an_image_has_the_same_views_whatever_the_worker():
    source = open_source("digits", "")
    images = PretrainImages(source, AsymmetricViews(16, 1, 0.5, hflip=False), seed=5)
    sample = images[(2, 11)]
    wanted = images.views(source.read(11), derived_seed(5, AUGMENT, 2, 11))
    assert all(map(torch.equal, sample.pixels, wanted))


def named(steps):
    return {type(step).__name__: step for step in steps.transforms}


def test_the_first_view_is_always_blurred_and_only_the_second_solarised():
    first, second = AsymmetricViews(224, 3, 0.08, hflip=True).steps
    blurs = [[step for step in steps.transforms if isinstance(step, v2.RandomApply)][1] for steps in (first, second)]
    assert [blur.p for blur in blurs] == [1.0, 0.1]
    assert blurs[0].transforms[0].kernel_size == (23, 23) and tuple(blurs[0].transforms[0].sigma) == (0.1, 2.0)
    assert "RandomSolarize" not in named(first) and named(second)["RandomSolarize"].p == 0.2
    assert tuple(named(first)["RandomResizedCrop"].scale) == (0.08, 1.0)
    assert [type(step).__name__ for step in second.transforms] == [
        "RandomResizedCrop", "RandomApply", "RandomGrayscale", "RandomApply", "RandomSolarize", "RandomHorizontalFlip",
    ]  # fmt: skip


def test_blur_is_scaled_to_small_images_and_grey_ones_have_no_colour_jitter():
    steps = view_steps(28, 1, scale=(0.5, 1.0), hflip=False, blur=1.0, solarize=0.0)
    jitter, blur = (step.transforms[0] for step in steps.transforms if isinstance(step, v2.RandomApply))
    assert blur.kernel_size == (3, 3)
    assert jitter.saturation is None and jitter.hue is None and tuple(jitter.brightness) == (0.6, 1.4)
    assert len(steps.transforms) == 3  # neither grey conversion nor mirroring


def test_solarisation_inverts_what_is_bright():
    steps = view_steps(4, 1, scale=(1.0, 1.0), hflip=False, blur=0.0, solarize=1.0)
    solarise = named(steps)["RandomSolarize"]
    pixels = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).view(1, 2, 2)
    assert solarise(pixels).flatten().tolist() == [0, 127, 127, 0]


def test_multi_crop_gives_two_global_and_many_local_views():
    views = MultiCrop(28, 3, 0.4, hflip=True, local_crops=3, local_size=12, local_scale=0.05)
    made = views(picture(), 3)
    assert [tuple(view.shape) for view in made] == [(3, 28, 28)] * 2 + [(3, 12, 12)] * 3
    assert all(view.dtype == torch.uint8 for view in made) and not torch.equal(made[2], made[3])
    assert all(map(torch.equal, views(picture(), 3), made))
    crops = [named(steps)["RandomResizedCrop"] for steps in views.steps]
    assert [tuple(crop.scale) for crop in crops] == [(0.4, 1.0)] * 2 + [(0.05, 0.4)] * 3
    blurs = [[step for step in steps.transforms if isinstance(step, v2.RandomApply)][1].p for steps in views.steps]
    assert blurs == [1.0, 0.1, 0.5, 0.5, 0.5]
    assert ["RandomSolarize" in named(steps) for steps in views.steps] == [False, True, False, False, False]


@pytest.mark.parametrize("in_chans", [1, 3])
def test_views_are_as_published_to_the_bit_unless_told_otherwise(in_chans):
    colour = {"saturation": 0.2, "hue": 0.1} if in_chans == 3 else {}

    def published(size, scale, blur, *more, interpolation=v2.InterpolationMode.BILINEAR):
        grey = [v2.RandomGrayscale(p=0.2)] if in_chans == 3 else []
        return v2.Compose([
            v2.RandomResizedCrop(size, scale=scale, interpolation=interpolation, antialias=True),
            v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, **colour)], p=0.8), *grey,
            v2.RandomApply([v2.GaussianBlur(3, (0.1, 2.0))], p=blur), *more, v2.RandomHorizontalFlip(),
        ])  # fmt: skip

    solarize, bicubic = v2.RandomSolarize(128, p=0.2), {"interpolation": v2.InterpolationMode.BICUBIC}
    two = [published(28, (0.2, 1.0), 1.0), published(28, (0.2, 1.0), 0.1, solarize)]
    crops = [published(28, (0.2, 1.0), 1.0, **bicubic), published(28, (0.2, 1.0), 0.1, solarize, **bicubic),
             published(12, (0.05, 0.2), 0.5, **bicubic)]  # fmt: skip
    local = {"local_crops": 1, "local_size": 12, "local_scale": 0.05}
    for views, steps in ((AsymmetricViews(28, in_chans, 0.2, True), two),
                         (MultiCrop(28, in_chans, 0.2, True, **local), crops)):  # fmt: skip
        for seed in range(30):
            assert all(map(torch.equal, views(picture(), seed), ImageViews(in_chans, steps)(picture(), seed)))


def test_weaker_views_are_blurred_solarised_and_jittered_less():
    given = {"jitter": 0.1, "blur": 0.3, "solarize": 0.0}
    views = [
        *AsymmetricViews(28, 3, 0.2, True, Strength(**given)).steps,
        *MultiCrop(28, 3, 0.4, True, local_crops=1, local_size=12, local_scale=0.05, strength=Strength(**given)).steps,
    ]
    for steps in views:
        jitter, blur = (step for step in steps.transforms if isinstance(step, v2.RandomApply))
        assert blur.p == 0.3 and "RandomSolarize" not in named(steps)
        assert tuple(jitter.transforms[0].brightness) == tuple(jitter.transforms[0].contrast) == (0.9, 1.1)
        assert jitter.transforms[0].saturation == (0.95, 1.05) and jitter.transforms[0].hue == (-0.025, 0.025)
    first, second = AsymmetricViews(28, 3, 0.2, True, Strength(solarize=0.7)).steps
    assert "RandomSolarize" not in named(first) and named(second)["RandomSolarize"].p == 0.7


def test_without_jitter_blur_solarisation_and_crop_a_view_is_the_image():
    views = AsymmetricViews(8, 1, 1.0, False, Strength(jitter=0.0, blur=0.0, solarize=0.0))
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8) * 4
    for step in views.steps:
        step.transforms[0].ratio = (1.0, 1.0)
    assert all(torch.equal(view, image) for seed in range(5) for view in views(image, seed))
