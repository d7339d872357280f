"""Joints by heat maps: what they look like, the linear layer that draws them, and the places that are read from them.

A heat map has cells that cover the picture evenly: cell i of W covers pixels ``i S / W`` to ``(i + 1) S / W`` of S, and
its middle stands for it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FINER = 4  # cells a side of each patch
_WIDTH = 1 / 32  # deviation of the target, over the map's side: 2 cells of 64, as published
_LEAST_WIDTH = 1.0  # cells


class LinearKeypoints(nn.Module):
    """Normalised over the batch, and one linear layer to a heat map per joint, four cells a side of each patch.

    The "simple decoder" of ViTPose (arXiv:2204.12484) with a 1 x 1 convolution: it is applied before the maps are made
    finer, which gives the same numbers as after.

    Args:
        dim: channels of the maps.
        joints: K.
        side: pixels a side of the images, in which places are.
    """

    def __init__(self, dim: int, joints: int, side: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(dim), nn.Conv2d(dim, joints, 1)
        self.side = side
        nn.init.normal_(self.linear.weight, std=0.001)
        nn.init.zeros_(self.linear.bias)  # type: ignore[arg-type]

    def forward(self, maps: Tensor) -> Tensor:
        """Heat maps ``[B, K, 4h, 4w]``."""
        return F.interpolate(self.linear(self.norm(maps)), scale_factor=_FINER, mode="bilinear")

    def loss(self, maps: Tensor, joints: Tensor, early: bool) -> Tensor:
        """Squared error of the heat maps, the mean over the cells of the labelled joints.

        Args:
            joints: ``[B, K, 3]`` x, y and flag.
        """
        drawn = self(maps)
        wanted = gaussian_maps(joints, (drawn.shape[2], drawn.shape[3]), self.side)
        weights = (joints[..., 2] > 0).to(drawn.dtype)
        errors = (drawn - wanted).square().mean((2, 3))
        return (errors * weights).sum() / weights.sum().clamp(min=1)

    def predict(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """``[B, K, 3]``: x, y and the height of the heat map there."""
        return decoded(self(maps), size)


def gaussian_maps(joints: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """``[B, K, H, W]``: of height 1 at each joint of ``[B, K, 3]``, whichever its flag is.

    Its deviation is 1/32 of the map's larger side, at least one cell.
    """
    height, width = grid
    deviation = max(_LEAST_WIDTH, max(grid) * _WIDTH)
    parts = []
    for axis, cells in ((1, height), (0, width)):
        middles = torch.arange(cells, device=joints.device) + 0.5
        offset = joints[..., axis, None] * (cells / side) - middles
        parts.append((-offset.square() / (2 * deviation**2)).exp())
    return parts[0][..., :, None] * parts[1][..., None, :]


def decoded(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Places ``[B, K, 3]`` of the highest cells of ``[B, K, H, W]``, in pixels, with their heights.

    The highest cell's middle, a quarter of a cell towards the higher of its two neighbours along each axis; at an edge,
    where one is missing, and between equal ones, as it is.

    Args:
        size: rows and columns of pixels that the maps cover.
    """
    height, width = maps.shape[-2:]
    heights, places = maps.flatten(2).max(2)
    rows, columns = places // width, places % width
    batch, joint = torch.meshgrid(*(torch.arange(n, device=maps.device) for n in maps.shape[:2]), indexing="ij")
    x = columns + 0.5 + 0.25 * _slope(lambda step: maps[batch, joint, rows, (columns + step) % width], columns, width)
    y = rows + 0.5 + 0.25 * _slope(lambda step: maps[batch, joint, (rows + step) % height, columns], rows, height)
    return torch.stack([x * (size[1] / width), y * (size[0] / height), heights], -1)


def _slope(neighbour: Callable[[int], Tensor], places: Tensor, cells: int) -> Tensor:
    """The sign of the difference between the next cell and the one before, 0 at the edges."""
    inner = (places > 0) & (places < cells - 1)
    return (neighbour(1) - neighbour(-1)).sign() * inner
