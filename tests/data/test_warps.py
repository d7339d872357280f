"""Known warps: where points go by hand, and pictures that go with them."""

import math

import pytest
import torch

from mimkernels.data.warps import moved_points, pixel_middles, random_warps, warped_images

IDENTITY = torch.eye(3, dtype=torch.float64)
CORNERS = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])


def test_corners_by_hand():
    turned = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # x to y, y to -x
    shifted = torch.tensor([[0.5, 0.0, 0.25], [0.0, 2.0, -1.0], [0.0, 0.0, 1.0]])
    tilted = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 1.0]])  # divides by 1 + x / 2
    moved = moved_points(torch.stack([turned, shifted, tilted]), CORNERS)
    assert moved[0].tolist() == [[1, -1], [1, 1], [-1, 1], [-1, -1]]
    assert moved[1].tolist() == [[-0.25, -3], [0.75, -3], [0.75, 1], [-0.25, 1]]
    third = 2 / 3
    torch.testing.assert_close(
        moved[2], torch.tensor([[-2, -2], [third, -third], [third, third], [-2, 2]], dtype=torch.float64)
    )


def test_middles_of_pixels_by_hand():
    assert pixel_middles(2, 4).tolist() == [
        [[-0.75, -0.5], [-0.25, -0.5], [0.25, -0.5], [0.75, -0.5]],
        [[-0.75, 0.5], [-0.25, 0.5], [0.25, 0.5], [0.75, 0.5]],
    ]


def test_no_warp_and_a_shift_by_whole_pixels():
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shift = IDENTITY.clone()
    shift[0, 2] = 2 * 3 / 8  # three pixels to the right
    warped = warped_images(images, torch.stack([IDENTITY, shift]))
    assert torch.equal(warped[0], images[0])
    assert torch.equal(warped[1, :, :, 3:], images[1, :, :, :-3])
    mean = images[1].float().mean((1, 2)).round().to(torch.uint8)
    assert torch.equal(warped[1, :, :, :3], mean[:, None, None].expand(-1, 8, 3))
    with pytest.raises(ValueError, match="1 warps, 2 images"):
        warped_images(images, IDENTITY[None])


def test_pictures_go_where_points_go():
    """The middle of a bright spot is where its point is said to go, whatever the warp."""
    warps, side = random_warps(40, 5), 64
    points = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    warps = warps[(moved_points(warps, points)[:, 0].abs() < 0.75).all(1)]  # all of the spot is in the picture
    assert len(warps) > 20
    distance = (pixel_middles(side, side) - points).square().sum(-1)
    spot = (255 * torch.exp(-distance / 0.01)).round().to(torch.uint8).expand(len(warps), 1, side, side)
    warped = (warped_images(spot, warps).double() - spot.double().mean().round()).clamp(min=0)
    weights = warped * (warped > 40)
    found = (weights[..., None] * pixel_middles(side, side)).sum((1, 2, 3)) / weights.sum((1, 2, 3))[:, None]
    moved = moved_points(warps, points)[:, 0]
    assert (found - moved).norm(dim=1).max() < 0.5 * 2 / side  # half a pixel


def test_a_warp_depends_on_the_seed_and_its_number_alone():
    assert torch.equal(random_warps(3, 7), random_warps(9, 7)[:3])
    assert not torch.equal(random_warps(3, 7), random_warps(3, 8))
    assert random_warps(0, 7).shape == (0, 3, 3)


def test_warps_are_moderate_and_of_every_kind():
    warps = random_warps(200, 0)
    area = torch.linalg.det(warps[:, :2, :2])
    assert 1 / 2 < area.min() < 0.8 and 1.3 < area.max() < 2.2
    tilted = warps[:, 2, :2].abs().sum(1) > 0
    gram = warps[~tilted, :2, :2].transpose(1, 2) @ warps[~tilted, :2, :2]
    similar = (gram[:, 0, 1].abs() < 1e-9) & ((gram[:, 0, 0] - gram[:, 1, 1]).abs() < 1e-9)
    counts = [int(similar.sum()), int((~similar).sum()), int(tilted.sum())]
    assert min(counts) > 40 and sum(counts) == 200
    inside = moved_points(warps, torch.zeros(1, 2))[:, 0]
    assert 0.5 < inside.abs().max() <= 0.6
    assert math.isclose(float(moved_points(warps, CORNERS).isfinite().double().mean()), 1.0)
