"""Pictures of attention: where one marked query looks, in layers at several depths."""

from typing import NamedTuple

import torch
from torch import Tensor

from mimkernels.commands.analyze.maps import Maps
from mimkernels.engine.figures import as_colour, enlarged, overlay, png_address

_IMAGES = 6
_MARK = (0.84, 0.12, 0.1)  # red, as in the papers


class MarkedQueries(NamedTuple):
    """Rows of pictures with names, as data addresses."""

    name: str
    rows: list[tuple[str, list[str]]]


def marked_queries(name: str, maps: Maps) -> MarkedQueries:
    """Attention of the central patch at three depths, and of [cls] in the last layer, mean over heads."""
    count = min(_IMAGES, len(maps.images))
    images = [as_colour(image) for image in maps.images[:count]]
    rows, columns = maps.grid
    query = maps.query_at(rows // 2, columns // 2)
    place = maps.queries[query] - maps.num_prefix
    row, column = divmod(place, columns)
    shown = [("image", [png_address(_marked(enlarged(image), row, column, maps)) for image in images])]
    last = len(maps.layers) - 1
    for layer in sorted({0, last // 2, last}):
        pictures = [
            _marked(overlay(image, maps.row(number, layer, query)), row, column, maps)
            for number, image in enumerate(images)
        ]
        shown.append((f"layer {layer + 1}", [png_address(picture) for picture in pictures]))
    if maps.num_prefix and maps.has_cls:
        pictures = [overlay(image, maps.row(number, last, 0)) for number, image in enumerate(images)]
        shown.append((f"[cls], layer {last + 1}", [png_address(picture) for picture in pictures]))
    return MarkedQueries(name, shown)


def _marked(picture: Tensor, row: int, column: int, maps: Maps) -> Tensor:
    """A picture ``[3, S, S]`` with a box around one patch."""
    height, width = picture.shape[1] // maps.grid[0], picture.shape[2] // maps.grid[1]
    top, left, line = row * height, column * width, max(1, picture.shape[-1] // 64)
    marked = picture.clone()
    box = marked[:, top : top + height, left : left + width]
    inner = box[:, line:-line, line:-line].clone()
    box[:] = torch.tensor(_MARK)[:, None, None]
    box[:, line:-line, line:-line] = inner
    return marked
