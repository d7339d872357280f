import random

import numpy as np
import pytest
import torch

from mimkernels.data.augment import FinetuneAugmentation
from mimkernels.data.batches import drawing_from


def made(in_chans: int = 1, **options) -> FinetuneAugmentation:
    settings = {"auto_augment": "rand-m9-mstd0.5-inc1", "mean": (0.5,) * in_chans, "test_crop": 1.0, **options}
    return FinetuneAugmentation(16, in_chans, 0.6, True, **settings)


def test_everything_that_draws_draws_from_the_seed_and_is_left_as_it_was():
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()]

    def drawn() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    with drawing_from(2**40 + 3):
        first = drawn()
    with drawing_from(2**40 + 3):
        assert drawn() == first
    with drawing_from(4):
        assert drawn() != first
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("in_chans", [1, 3])
def test_an_image_is_augmented_by_its_seed_alone(in_chans):
    image = torch.randint(0, 256, (in_chans, 20, 20), dtype=torch.uint8)
    augment = made(in_chans)
    several = [augment(image, seed) for seed in range(8)]
    assert all(pixels.shape == (in_chans, 16, 16) and pixels.dtype == torch.uint8 for pixels in several)
    assert len({pixels.numpy().tobytes() for pixels in several}) == 8
    assert torch.equal(made(in_chans)(image, 3), several[3])
    cropped = made(in_chans, auto_augment="none")(image, 3)
    assert not torch.equal(cropped, several[3])


def test_tests_are_on_a_part_of_the_central_square():
    image = torch.zeros(1, 32, 40, dtype=torch.uint8)
    image[:, 8:24, 12:28] = 255
    assert made(test_crop=0.5).plain(image).min() == 255
    assert made(test_crop=1.0).plain(image)[0, 0].max() == 0


def test_an_augmentation_that_timm_has_not_is_refused():
    with pytest.raises(ValueError, match="auto_augment must be none or an augmentation of timm"):
        made(auto_augment="rand-x9")
