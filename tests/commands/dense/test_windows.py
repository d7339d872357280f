"""Sliding windows: where they lie, by hand, and that what they hold is put together again."""

import weakref

import pytest
import torch
from torch import Tensor

from mimkernels.commands.dense.heads import Reader, predict_whole
from mimkernels.commands.dense.windows import merged, slide


def test_windows_lie_as_published():
    """Of 512 pixels at steps of 341, the last one at the edge."""
    windows = slide([torch.zeros(3, 512, 683, dtype=torch.uint8), torch.zeros(3, 1195, 512, dtype=torch.uint8)], 512)
    assert windows.corners == [[(0, 0), (0, 171)], [(0, 0), (341, 0), (682, 0), (683, 0)]]
    assert windows.images.shape == (6, 3, 512, 512) and windows.sizes == [(512, 683), (1195, 512)]
    assert list(windows.spans()) == [(0, slice(0, 2)), (1, slice(2, 6))]
    assert slide([torch.zeros(3, 9, 9, dtype=torch.uint8)], 9).corners == [[(0, 0)]]


def test_what_windows_hold_is_put_together_again():
    image = torch.randint(256, (3, 13, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    windows = slide([image], 6)
    assert torch.equal(merged(windows.images.float().split(3), (13, 20), windows.corners[0]).to(torch.uint8), image)


def test_overlaps_are_means():
    values = torch.stack([torch.full((1, 3, 3), 2.0), torch.full((1, 3, 3), 6.0)])
    assert merged([values], (3, 5), [(0, 0), (0, 2)])[0, 0].tolist() == [2, 2, 4, 6, 6]


def test_windows_of_a_long_image_are_not_held_together():
    """What is read of 150 windows, of which 16 are read at once, in fp64; the first batches are gone at the end."""
    image = torch.randint(256, (3, 12, 1200), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    windows = slide([image], 12)
    made: list[weakref.ref[Tensor]] = []
    held = []

    class Doubled(Reader):
        def values(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
            held.append(sum(batch() is not None for batch in made))
            values = 2 * maps
            made.append(weakref.ref(values))
            return values

    maps = windows.images.double()
    (predicted,) = predict_whole(Doubled(), [maps], windows, [(12, 1200)], torch.device("cpu"), [])
    assert torch.equal(predicted, image.double().argmax(0).to(torch.uint8))
    assert len(maps) == 150 and len(made) == 10 and max(held) <= 1


def test_images_smaller_than_a_window_are_refused():
    with pytest.raises(ValueError, match="windows of 8 pixels do not fit in an image of 7 x 9"):
        slide([torch.zeros(3, 7, 9, dtype=torch.uint8)], 8)
