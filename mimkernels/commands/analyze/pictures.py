"""Pictures of attention: where marked queries look in the last layer, and what trained poolings weigh beside it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimkernels._palette import SERIES
from mimkernels.commands.analyze.maps import Maps
from mimkernels.engine.figures import as_colour, enlarged, overlay, png_address

_IMAGES = 4
# Where the marked patches lie, as shares of height and width.
_PLACES = ((0.5, 0.5), (0.25, 0.3), (0.75, 0.7))
_COLOURS = (SERIES[1], SERIES[3], SERIES[2])


class MarkedImage(NamedTuple):
    """Pictures of one image in rows by model, as data addresses; None where a model has none.

    Attributes:
        columns: name and colour of what is shown; the first is the image itself.
    """

    columns: list[tuple[str, str]]
    rows: list[tuple[str, list[str | None]]]


def marked_images(maps: Mapping[str, Maps], pooled: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[MarkedImage]:
    """Attention of [cls] and of three marked patches in the last layer, mean over heads, models below each other.

    Args:
        maps: by model.
        pooled: ``Measured.pooled`` by model.
    """
    with_cls = any(one.num_prefix and one.has_cls for one in maps.values())
    poolings = list(dict.fromkeys(name for model in maps for name in pooled.get(model, ())))
    columns = [("image", ""), *([("[cls]", "")] if with_cls else [])]
    columns += [(f"patch {number}", colour) for number, colour in enumerate(_COLOURS, 1)]
    columns += [(name, "") for name in poolings]
    count = min(len(one.images) for one in maps.values())
    chosen = sorted({number * count // _IMAGES for number in range(_IMAGES)})
    return [
        MarkedImage(
            columns,
            [
                (model, _row(one, number, with_cls, [pooled.get(model, {}).get(name) for name in poolings]))
                for model, one in maps.items()
            ],
        )
        for number in chosen
    ]


def _row(maps: Maps, number: int, with_cls: bool, poolings: list[Mapping[str, Any] | None]) -> list[str | None]:
    image, last = as_colour(maps.images[number]), len(maps.layers) - 1
    rows, columns = maps.grid
    queries = [maps.query_at(int(down * rows), int(right * columns)) for down, right in _PLACES]
    marks = [divmod(maps.queries[query] - maps.num_prefix, columns) for query in queries]
    original = enlarged(image)
    for place, colour in zip(marks, _COLOURS, strict=True):
        original = _marked(original, place, colour, maps)
    pictures: list[Tensor | None] = [original]
    if with_cls:
        pictures.append(overlay(image, maps.row(number, last, 0)) if maps.num_prefix and maps.has_cls else None)
    for query, place, colour in zip(queries, marks, _COLOURS, strict=True):
        pictures.append(_marked(overlay(image, maps.row(number, last, query)), place, colour, maps))
    pictures += [None if pooling is None else overlay(image, pooling["weights"][number]) for pooling in poolings]
    return [None if picture is None else png_address(picture) for picture in pictures]


def _marked(picture: Tensor, place: tuple[int, int], colour: str, maps: Maps) -> Tensor:
    """A picture ``[3, S, S]`` with a box around one patch, white within the colour."""
    height, width = picture.shape[1] // maps.grid[0], picture.shape[2] // maps.grid[1]
    top, left = place[0] * height, place[1] * width
    line = max(1, min(picture.shape[-1] // 64, height // 6, width // 6))
    marked = picture.clone()
    box = marked[:, top : top + height, left : left + width]
    inner = box[:, 2 * line : -2 * line, 2 * line : -2 * line].clone()
    box[:] = torch.tensor([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])[:, None, None]
    box[:, line:-line, line:-line] = 1.0
    box[:, 2 * line : -2 * line, 2 * line : -2 * line] = inner
    return marked
