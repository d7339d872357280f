"""Attention rows of a few images, small enough to lie in a page: one byte a weight, per row relative to its maximum."""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimkernels.engine.encoder import FrozenEncoder
from mimkernels.heads import LayerHeads, RecordedHeads
from mimkernels.nn.windows import Windows, windows_of
from mimkernels.ops import attention_rows

# Of one model in a page; larger ones keep the rows of every second (third, ...) patch.
MOST_BYTES = 24 * 2**20


@dataclass
class Maps:
    """Attention of chosen queries on a few images.

    A row holds K keys: all N patches, or those of the query's window. What layers with fewer heads or keys than others
    lack is 0.

    Attributes:
        layers: names of the layers, in order.
        grid: rows and columns of patches; of Swin, those of its first stage.
        num_prefix: leading tokens that are no patches.
        queries: token numbers of the queries: all prefix tokens, then patches.
        stride: of those patches, along both axes of the grid.
        images: ``[I, C, S, S]`` uint8.
        weights: ``[I, L, H, Q, K]`` uint8: 255 times attention to a patch divided by the row's maximum over patches.
        maxima: ``[I, L, H, Q]`` fp32 of the rows.
        prefix: ``[I, L, H, Q, P]`` fp32 attention to prefix tokens.
        has_cls: the first of them is [cls].
        places: ``[L, Q, K]`` int32 of windows: where the keys lie in the layer's grid, row by row, -1 for none; None
            where rows are of all patches.
        grids, heads: rows and columns, and number of heads, of every layer, where there are `places`.
    """

    layers: list[str]
    grid: list[int]
    num_prefix: int
    queries: list[int]
    stride: int
    images: Tensor
    weights: Tensor
    maxima: Tensor
    prefix: Tensor
    has_cls: bool = True
    places: Tensor | None = None
    grids: list[list[int]] | None = None
    heads: list[int] | None = None

    def row(self, image: int, layer: int, query: int) -> Tensor:
        """``[rows, columns]`` of the layer: mean over heads of the attention that one query pays to patches."""
        weights = self.weights[image, layer, :, query].float() / 255 * self.maxima[image, layer, :, query, None]
        if self.places is None:
            return weights.mean(0).unflatten(0, tuple(self.grid))
        assert self.grids is not None and self.heads is not None
        rows, columns = self.grids[layer]
        place = self.places[layer, query].long()
        weights = weights[: self.heads[layer], place >= 0].mean(0)
        return torch.zeros(rows * columns).scatter(0, place[place >= 0], weights).view(rows, columns)

    def query_at(self, row: int, column: int) -> int:
        """The place in ``queries`` of the stored patch next to one of the grid."""
        near = (row // self.stride * self.stride) * self.grid[1] + column // self.stride * self.stride
        return self.queries.index(self.num_prefix + near)

    def for_page(self, name: str) -> dict[str, Any]:
        """What the viewer's script reads: sizes, and everything else as deflated base64."""
        parts = [self.weights, self.maxima, self.prefix]
        if self.places is not None:
            parts.append(self.places)
        content = b"".join(part.contiguous().numpy().tobytes() for part in parts)
        return {
            "name": name,
            "grid": self.grid,
            "prefix": self.num_prefix,
            "cls": self.has_cls and self.num_prefix > 0,
            "queries": self.queries,
            "stride": self.stride,
            "shape": list(self.weights.shape),
            "grids": self.grids,
            "heads": self.heads,
            "data": base64.b64encode(zlib.compress(content, 6)).decode(),
        }


def queries_of(grid: Sequence[int], num_prefix: int, per_query: int) -> tuple[list[int], int]:
    """Queries whose rows fit into ``MOST_BYTES``, and the stride of the patches among them.

    Args:
        per_query: bytes of one query's rows in all layers, heads and images.
    """
    rows, columns = grid
    for stride in range(1, max(rows, columns) + 1):
        patches = [row * columns + column for row in range(0, rows, stride) for column in range(0, columns, stride)]
        if (num_prefix + len(patches)) * per_query <= MOST_BYTES:
            break
    return [*range(num_prefix), *(num_prefix + patch for patch in patches)], stride


class ShownImages:
    """Attention rows and last tokens of a few images, taken from the batches of a pass that ``capture`` sees.

    Rows are of every layer and head. Of models in windows, they are those within the window; else layers of other
    tokens than the first are left out.

    Args:
        positions: of the images in the pass.
        heads: what is captured, with q and k kept.
    """

    def __init__(self, encoder: FrozenEncoder, positions: Sequence[int], heads: RecordedHeads) -> None:
        self._encoder, self._heads = encoder, heads
        self._wanted = torch.tensor(positions if encoder.grid is not None else (), dtype=torch.int64)
        self._places: list[int] = []
        self._maps: list[Maps] = []
        self._tokens: list[Tensor] = []
        heads.kept_images = self._places

    def expect(self, positions: Tensor) -> None:
        """Say which images the next batch is of; to be called before the encoder."""
        self._places = torch.isin(positions, self._wanted).nonzero().flatten().tolist()
        self._heads.kept_images = self._places

    @torch.no_grad()
    def add(self, images: Tensor, tokens: Tensor) -> None:
        """Take the batch that has run, ``images [B, C, S, S]`` and their last tokens."""
        if self._places:
            maps = _maps_of(self._encoder, images[self._places], list(self._heads.values()), len(self._wanted))
            if maps is not None:
                self._maps.append(maps)
            self._tokens.append(tokens[self._places].float())

    @property
    def maps(self) -> Maps | None:
        """Of all images; None without any, and of models whose patches form no grid."""
        if not self._maps:
            return None
        images, weights, maxima, prefix = (
            torch.cat([getattr(maps, name) for maps in self._maps])
            for name in ("images", "weights", "maxima", "prefix")
        )
        return replace(self._maps[0], images=images, weights=weights, maxima=maxima, prefix=prefix)

    @property
    def tokens(self) -> Tensor | None:
        """``[I, N, D]`` last tokens of the same images."""
        return torch.cat(self._tokens) if self._tokens else None


def _maps_of(encoder: FrozenEncoder, images: Tensor, heads: Sequence[LayerHeads], total: int) -> Maps | None:
    """Rows of `images` ``[I, C, S, S]`` uint8, whose q and k are kept; `total` images share ``MOST_BYTES``."""
    assert encoder.grid is not None
    if any(layer.windows > 1 for layer in heads):
        return _maps_of_windows(encoder, images, heads, total)
    tokens = encoder.num_prefix + encoder.grid[0] * encoder.grid[1]
    layers = [
        layer
        for layer in heads
        if layer.q is not None and layer.queries == layer.keys == tokens and len(layer.q) == len(images)
    ]
    layers = [layer for layer in layers if layer.heads == layers[0].heads]
    if not layers:
        return None
    queries, stride = queries_of(encoder.grid, encoder.num_prefix, total * len(layers) * layers[0].heads * tokens)
    weights, maxima, prefix = [], [], []
    for layer in layers:
        assert layer.q is not None and layer.k is not None
        rows = attention_rows(layer.q, layer.k, queries, **layer.options).cpu()  # [I, H, Q, N]
        scaled, highest = _as_bytes(rows[..., encoder.num_prefix :])
        weights.append(scaled)
        maxima.append(highest)
        prefix.append(rows[..., : encoder.num_prefix])
    return Maps(
        [layer.name for layer in layers],
        list(encoder.grid),
        encoder.num_prefix,
        queries,
        stride,
        images.cpu(),
        torch.stack(weights, 1),
        torch.stack(maxima, 1),
        torch.stack(prefix, 1),
        encoder.has_cls_token,
    )


def _as_bytes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[..., K]`` relative to their maximum, uint8, and the maxima ``[...]``."""
    highest = rows.amax(-1)
    return (255 * rows / highest.clamp(min=1e-30)[..., None]).round().to(torch.uint8), highest


class _InWindows(NamedTuple):
    """A layer and the windows that it runs in."""

    layer: LayerHeads
    windows: Windows


def _maps_of_windows(encoder: FrozenEncoder, images: Tensor, layers: Sequence[LayerHeads], total: int) -> Maps | None:
    """Rows within the windows that queries of the first stage, or what they were merged into, are in."""
    found = []
    for layer in layers:
        windows = windows_of(encoder.model.get_submodule(layer.name.rpartition(".")[0]))
        if windows is not None and windows.number == layer.windows and layer.q is not None:
            found.append(_InWindows(layer, windows))
    if not found:
        return None
    grid = found[0].windows.grid
    heads, keys = max(layer.heads for layer, _ in found), max(layer.keys for layer, _ in found)
    queries, stride = queries_of(grid, 0, total * len(found) * heads * keys)
    weights, maxima, places = [], [], []
    for layer, windows in found:
        rows, place = _window_rows(layer, windows, queries, grid)
        scaled, highest = _as_bytes(rows)
        missing = heads - layer.heads
        weights.append(F.pad(scaled, (0, keys - layer.keys, 0, 0, 0, missing)))
        maxima.append(F.pad(highest, (0, 0, 0, missing)))
        places.append(F.pad(place, (0, keys - layer.keys), value=-1))
    return Maps(
        [layer.name for layer, _ in found],
        list(grid),
        0,
        queries,
        stride,
        images.cpu(),
        torch.stack(weights, 1),
        torch.stack(maxima, 1),
        torch.zeros(len(images), len(found), heads, len(queries), 0),
        has_cls=False,
        places=torch.stack(places).to(torch.int32),
        grids=[list(windows.grid) for _, windows in found],
        heads=[layer.heads for layer, _ in found],
    )


def _window_rows(
    layer: LayerHeads, windows: Windows, queries: Sequence[int], grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Rows ``[I, H, Q, K]`` of the tokens that patches of `grid` are in, and ``[Q, K]`` where their keys lie."""
    assert layer.q is not None and layer.k is not None
    ids, (rows, columns) = windows.ids(), windows.grid  # ids [nW, K] in the padded grid
    query = torch.tensor(queries)
    token = query // grid[1] * rows // grid[0] * windows.padded[1] + query % grid[1] * columns // grid[1]
    at = ids.flatten().argsort()[token]
    window, inside = at // ids.shape[1], at % ids.shape[1]
    needed, number = inside.unique(return_inverse=True)
    made = attention_rows(layer.q, layer.k, needed.tolist(), **layer.options).cpu().unflatten(0, (-1, windows.number))
    made = made.permute(1, 3, 0, 2, 4)[window, number].permute(1, 2, 0, 3)  # of [nW, R, I, H, K]
    keys = ids[window]  # [Q, K]
    row, column = keys // windows.padded[1], keys % windows.padded[1]
    inside_image = (row < rows) & (column < columns)
    return made * inside_image, torch.where(inside_image, row * columns + column, -1)
