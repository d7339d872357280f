"""Whole images by sliding windows: squares that overlap, encoded one by one, and what is read of them averaged."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Windows(NamedTuple):
    """Squares of images.

    Attributes:
        images: ``[w, 3, S, S]`` uint8, all squares of the first image, then of the second, and so on.
        sizes: height and width of every image.
        corners: of every image the top and left of its squares.
    """

    images: Tensor
    sizes: list[tuple[int, int]]
    corners: list[list[tuple[int, int]]]

    def spans(self) -> Iterator[tuple[int, slice]]:
        """Each image's number with the slice of its squares."""
        start = 0
        for number, corners in enumerate(self.corners):
            yield number, slice(start, start + len(corners))
            start += len(corners)


def slide(images: Sequence[Tensor], side: int) -> Windows:
    """Squares of `side` pixels at steps of two thirds of it, the last ones at the edge, of images ``[3, H, W]``.

    Raises:
        ValueError: an image is smaller than the squares.
    """
    squares, sizes, corners = [], [], []
    for image in images:
        height, width = image.shape[1:]
        if min(height, width) < side:
            raise ValueError(f"windows of {side} pixels do not fit in an image of {height} x {width}")
        sizes.append((height, width))
        corners.append([(top, left) for top in _starts(height, side) for left in _starts(width, side)])
        squares += [image[:, top : top + side, left : left + side] for top, left in corners[-1]]
    return Windows(torch.stack(squares), sizes, corners)


def _starts(length: int, side: int) -> list[int]:
    step = max(1, side * 2 // 3)
    count = 1 + -(-(length - side) // step)
    return [min(number * step, length - side) for number in range(count)]


def merged(batches: Iterable[Tensor], size: tuple[int, int], corners: list[tuple[int, int]]) -> Tensor:
    """``[C, H, W]``: the mean of an image's squares where they overlap, which come as batches ``[B, C, S, S]``.

    A batch is let go when the next has come: the squares of a large image together are more than twice its pixels.
    """
    total = count = None
    for square, (top, left) in zip(itertools.chain.from_iterable(batches), corners, strict=True):
        if total is None or count is None:
            total, count = square.new_zeros(len(square), *size), square.new_zeros(size)
        place = (slice(top, top + square.shape[-2]), slice(left, left + square.shape[-1]))
        total[:, *place] += square
        count[place] += 1
    assert total is not None and count is not None  # an image has a square at least
    return total.div_(count)
