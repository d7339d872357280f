"""Correspondence of frozen features: points of an image found again in a second one, by the most similar patch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimkernels.commands.dense.features import joined_batches
from mimkernels.data.warps import moved_points, pixel_middles

POINTS = 16  # asked for along each side of an image

_FLAT = 8  # levels of 255 that the pixels around a point span, below which nothing tells it from its neighbours
_TEMPERATURE = 0.05  # of cosines
_AT_ONCE = 16  # pairs


class Queries(NamedTuple):
    """Points of images and where they are in the images warped, ``(x, y)`` with the edges at -1 and 1.

    Attributes:
        points: ``[Q, 2]``, the same of every image.
        places: ``[n, Q, 2]``, where they are in the second image.
        asked: ``[n, Q]`` bool: visible in the second image, and not on one plain colour.
    """

    points: Tensor
    places: Tensor
    asked: Tensor


def queries(images: Tensor, warps: Tensor) -> Queries:
    """A grid of 16 x 16 points in ``[n, C, S, S]`` uint8 images, and where `warps` bring them."""
    points = pixel_middles(POINTS, POINTS).view(-1, 2)
    places = moved_points(warps, points)
    visible = (places.abs() < 1).all(-1)
    varied = [_spread(part) >= _FLAT for part in images.split(_AT_ONCE)]
    return Queries(points, places, visible & torch.cat(varied))


def _spread(images: Tensor) -> Tensor:
    """``[n, Q]``: how many levels of grey there are around each point."""
    grey = images.float().mean(1, keepdim=True)
    if min(grey.shape[2:]) <= POINTS:  # a point has one pixel or none to itself: with its neighbours
        high, low = F.max_pool2d(grey, 3, 1, 1), -F.max_pool2d(-grey, 3, 1, 1)
        return F.adaptive_max_pool2d(high - low, POINTS).flatten(1)
    high, low = F.adaptive_max_pool2d(grey, POINTS), -F.adaptive_max_pool2d(-grey, POINTS)
    return (high - low).flatten(1)


@torch.no_grad()
def matched(first: Sequence[Tensor], second: Sequence[Tensor], points: Tensor, device: torch.device) -> Tensor:
    """Where points of the first images look most alike in the second.

    The features of a point are sampled from the first map bilinearly. The patch of the second map with the largest
    cosine is refined to the mean of the 3 x 3 patches around it, weighted by ``exp(cosine / 0.05)``.

    Args:
        first, second: maps ``[n, D, h, w]`` of the two images, of the layers that are read together. Of no more than
            a few images at a time they are joined, in fp32 on `device`.
        points: ``[Q, 2]``.
        device: where cosines are computed.

    Returns:
        ``[n, Q, 2]`` float64, on the CPU.
    """
    places = points.to(device)
    batches = zip(*(joined_batches(maps, _AT_ONCE, device) for maps in (first, second)), strict=True)
    return torch.cat([_matched(one, other, places) for one, other in batches]).cpu()


def _matched(first: Tensor, second: Tensor, points: Tensor) -> Tensor:
    height, width = second.shape[-2:]
    grid = points.float().expand(len(first), 1, -1, -1)
    asked = F.grid_sample(first, grid, padding_mode="border", align_corners=False)[:, :, 0]  # [n, D, Q]
    cosines = torch.einsum("ndq,ndp->nqp", F.normalize(asked, dim=1), F.normalize(second.flatten(2), dim=1))
    best = cosines.argmax(-1)
    # The neighbourhood, in maps with a frame of -inf around.
    around = torch.arange(3, device=points.device)
    rows = (best // width)[..., None, None] + around[:, None]
    columns = (best % width)[..., None, None] + around
    framed = F.pad(cosines.unflatten(2, (height, width)), (1, 1, 1, 1), value=-torch.inf).flatten(2)
    near = framed.gather(2, (rows * (width + 2) + columns).flatten(2))  # [n, Q, 9]
    weights = (near / _TEMPERATURE).softmax(-1).double().unflatten(2, (3, 3))
    x, y = (2 * columns - 1) / width - 1, (2 * rows - 1) / height - 1
    return torch.stack([(weights * x).sum((-1, -2)), (weights * y).sum((-1, -2))], -1)


def distances(found: Tensor, asked: Queries) -> Tensor:
    """``[n, Q]``: how far places ``[n, Q, 2]`` lie from the right ones, in sides of the image."""
    return (found - asked.places).norm(dim=-1) / 2


class CorrespondenceScores(NamedTuple):
    """Over all points of all pairs that are asked for.

    Attributes:
        pck_10, pck_5: share of points found within 0.1 and 0.05 of the image's side (PCK).
        error: mean distance to the right place, in pixels of the images.
        unmoved_pck_10: what ``pck_10`` would be if every point were said to stay where it was.
        points: how many were asked for; the rest is NaN if there are none.
    """

    pck_10: float
    pck_5: float
    error: float
    unmoved_pck_10: float
    points: int


def correspondence_scores(found: Tensor, asked: Queries, side: int) -> CorrespondenceScores:
    """Scores of places ``[n, Q, 2]`` in images of `side` pixels."""
    distance, unmoved = (distances(places, asked)[asked.asked] for places in (found, asked.points.expand_as(found)))
    return CorrespondenceScores(
        pck_10=float((distance < 0.1).double().mean()),
        pck_5=float((distance < 0.05).double().mean()),
        error=float(side * distance.mean()),
        unmoved_pck_10=float((unmoved < 0.1).double().mean()),
        points=len(distance),
    )
