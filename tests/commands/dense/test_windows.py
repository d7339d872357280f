"""Sliding windows: where they lie, by hand, and that what they hold is put together again."""

import pytest
import torch

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
    assert torch.equal(merged(windows.images.float(), (13, 20), windows.corners[0]).to(torch.uint8), image)


def test_overlaps_are_means():
    values = torch.stack([torch.full((1, 3, 3), 2.0), torch.full((1, 3, 3), 6.0)])
    assert merged(values, (3, 5), [(0, 0), (0, 2)])[0, 0].tolist() == [2, 2, 4, 6, 6]


def test_images_smaller_than_a_window_are_refused():
    with pytest.raises(ValueError, match="windows of 8 pixels do not fit in an image of 7 x 9"):
        slide([torch.zeros(3, 7, 9, dtype=torch.uint8)], 8)
