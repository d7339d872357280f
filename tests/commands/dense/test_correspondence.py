"""Correspondence of `mimkernels dense`: matches known by hand, and the command on images without labels."""

import math

import pytest
import torch

from mimkernels.commands.dense import features
from mimkernels.commands.dense.config import DenseConfig
from mimkernels.commands.dense.data import DenseData, DenseImages
from mimkernels.commands.dense.features import joined
from mimkernels.commands.dense.matching import CorrespondenceScores, Queries, correspondence_scores, matched, queries
from mimkernels.commands.dense.tasks import correspondence as module
from mimkernels.commands.dense.tasks.base import Features, Job
from mimkernels.commands.dense.tasks.correspondence import Correspondence
from mimkernels.data.warps import pixel_middles

CPU = torch.device("cpu")
IDENTITY = torch.eye(3, dtype=torch.float64)


def distinct_maps(count, height, width):
    """Maps in which every patch of an image is orthogonal to the others."""
    return torch.eye(height * width).T.reshape(1, height * width, height, width).expand(count, -1, -1, -1)


def test_the_same_image_is_found_everywhere():
    maps = torch.randn(2, 32, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    asked = queries(noise, IDENTITY.expand(2, 3, 3))
    assert asked.asked.all() and asked.asked.shape == (2, 256)
    scores = correspondence_scores(matched([maps], [maps], asked.points, CPU), asked, 64)
    assert (scores.pck_10, scores.pck_5, scores.unmoved_pck_10, scores.points) == (1, 1, 1, 512)
    assert scores.error < 0.5  # pixels


def test_a_shift_by_whole_patches_is_exact():
    maps = distinct_maps(1, 4, 8)
    shifted = maps.roll((1, -2), dims=(2, 3))  # a patch down, two to the left
    points = pixel_middles(4, 8)[:3, 2:].reshape(-1, 2)
    found = matched([maps], [shifted], points, CPU)[0]
    expected = points + torch.tensor([-2 * 2 / 8, 2 / 4])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_point_between_patches_is_found_between_them():
    maps = distinct_maps(1, 4, 4)
    points = torch.tensor([[0.0, 0.25], [-0.75, -0.75], [-1.0, 1.0]])  # a border of two patches, a middle, a corner
    found = matched([maps], [maps], points, CPU)[0]
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.25], dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1:], torch.tensor([[-0.75, -0.75], [-0.75, 0.75]]).double(), atol=1e-5, rtol=0)


def test_layers_are_joined_for_a_few_images_at_a_time(monkeypatch):
    drawn = torch.Generator().manual_seed(0)
    first, second = ([torch.randn(40, 4, side, side, generator=drawn) for side in (8, 4)] for _ in range(2))
    points, counts = pixel_middles(4, 4).view(-1, 2), []
    together = matched([joined(first)], [joined(second)], points, CPU)

    def counted(maps):
        counts.append(len(maps[0]))
        return joined(maps)

    monkeypatch.setattr(features, "joined", counted)
    assert torch.equal(matched(first, second, points, CPU), together)
    assert max(counts) <= 16 and sum(counts) == 2 * 40


def test_what_leaves_the_picture_and_plain_colours_are_not_asked_for():
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    images[..., ::2, :16] = 200  # the left half has stripes
    shift = IDENTITY.clone()
    shift[0, 2] = -0.5
    asked = queries(images, shift[None])
    points = asked.points.expand_as(asked.places)
    torch.testing.assert_close(asked.places[..., 0], points[..., 0] - 0.5)
    expected = (points[..., 0] > -0.5) & (points[..., 0] < 0)
    assert torch.equal(asked.asked, expected) and int(expected.sum()) == 4 * 16


@pytest.mark.parametrize("side", [8, 16])
def test_small_images_have_points_where_their_neighbours_differ(side):
    images = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    images[..., : side // 2] = 200  # one edge, in the middle
    asked = queries(images, IDENTITY[None])
    columns = asked.asked.view(16, 16)
    beside = pixel_middles(16, 16)[0, :, 0].abs() < 2 / side  # pixels at the edge
    assert torch.equal(columns, beside.expand(16, 16))


def test_what_was_not_asked_for_is_no_number():
    scores = CorrespondenceScores(math.nan, math.nan, math.nan, math.nan, 0)
    task = Correspondence()
    assert task.cells(scores) == ["–", "–", "–"] and task.summary(scores) == "match@0.1 –"


def test_scores_by_hand():
    points = torch.zeros(4, 2, dtype=torch.float64)
    places = torch.tensor([[[0.1, 0.0], [0.0, 0.0], [0.5, 0.0], [0.9, 0.0]]], dtype=torch.float64)
    found = torch.tensor([[[0.1, 0.08], [0.12, 0.0], [0.5, 0.5], [-0.9, 0.0]]], dtype=torch.float64)
    asked = Queries(points, places, torch.tensor([[True, True, True, False]]))
    scores = correspondence_scores(found, asked, 100)  # off by 4, 6 and 25 pixels
    assert scores.pck_5 == pytest.approx(1 / 3) and scores.pck_10 == pytest.approx(2 / 3)
    assert scores.error == pytest.approx((4 + 6 + 25) / 3)
    assert scores.unmoved_pck_10 == pytest.approx(2 / 3) and scores.points == 3
    nothing = correspondence_scores(found, asked._replace(asked=torch.zeros(1, 4, dtype=torch.bool)), 100)
    assert nothing.points == 0 and math.isnan(nothing.pck_10) and math.isnan(nothing.error)


def shifted_noise(count=1, side=32):
    """Images of noise with their warps, a quarter of a side to the right."""
    noise = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shift = IDENTITY.clone()
    shift[0, 2] = 0.5
    return DenseImages(noise, warps=shift.expand(count, 3, 3))


def test_the_task_reads_what_moves_with_the_image():
    test = shifted_noise(2)
    data = DenseData(test.first(0), test, "noise")
    second = Correspondence().further_images(data)
    assert torch.equal(second[..., 8:], test.images[..., :-8])
    first, other = (images.float().unflatten(2, (8, 4)).unflatten(4, (8, 4)) for images in (test.images, second))
    maps = [each.permute(0, 1, 3, 5, 2, 4).reshape(2, 48, 8, 8) - 128 for each in (first, other)]  # pixels of patches
    config = DenseConfig(models=["x"], side=32)
    job = Job(config, data, Features([maps[0][:0]], data.train), Features([maps[0]], test), CPU, "", further=[maps[1]])
    reading = Correspondence().read(job)
    # The points of the three quarters that stay in the picture.
    assert reading.scores.points == 2 * 16 * 12 and reading.scores.pck_10 == 1 and reading.scores.error < 2
    assert reading.scores.unmoved_pck_10 == 0
    assert "match@0.1 of 0.0 %" in Correspondence().picture_text(data, test)
    # With the maps of the first image once more, points are found where they were.
    job.further = [maps[0]]
    assert Correspondence().read(job).scores.pck_10 == 0


def test_pictures_show_right_matches_in_green_and_wrong_ones_in_red(monkeypatch):
    pictures = []
    monkeypatch.setattr(module, "png_address", lambda picture: pictures.append(picture) or "")
    shown = shifted_noise()
    shown.images = shown.images // 64 + 120  # nearly grey, yet not plain
    shown.images[..., ::2] += 10
    data = DenseData(shown.first(0), shown, "noise")
    places = queries(shown.images, shown.warps).places
    ((name, _),) = Correspondence().true_rows(data, shown)
    ((label, _),) = Correspondence().read_rows(data, shown, "tiny", places + torch.tensor([0.0, 0.3]))
    assert (name, label) == ("right places", "tiny: matches")

    def share(picture, colour):
        wanted = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]).view(3, 1, 1)
        return float(((picture - wanted).abs().amax(0) < 0.1).float().mean())

    right, wrong = pictures
    assert right.shape[1] > 2 * right.shape[2]  # one above the other
    assert share(right, "#2ca02c") > 0.01 and share(right, "#d62728") == 0
    assert share(wrong, "#d62728") > 0.01 and share(wrong, "#2ca02c") == 0
