"""Attention rows of a few images, small enough to lie in a page: one byte a weight, per row relative to its maximum."""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mimkernels.engine.encoder import FrozenEncoder
from mimkernels.heads import capture
from mimkernels.ops import attention_rows

# Of one model in a page; larger ones keep the rows of every second (third, ...) patch.
MOST_BYTES = 24 * 2**20


@dataclass
class Maps:
    """Attention of chosen queries on a few images.

    Attributes:
        layers: names of the layers, in order.
        grid: rows and columns of patches.
        num_prefix: leading tokens that are no patches.
        queries: token numbers of the queries: all prefix tokens, then patches.
        stride: of those patches, along both axes of the grid.
        images: ``[I, C, S, S]`` uint8.
        weights: ``[I, L, H, Q, N]`` uint8: 255 times attention to a patch divided by the row's maximum over patches.
        maxima: ``[I, L, H, Q]`` fp32 of the rows.
        prefix: ``[I, L, H, Q, P]`` fp32 attention to prefix tokens.
        has_cls: the first of them is [cls].
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

    def row(self, image: int, layer: int, query: int) -> Tensor:
        """``[rows, columns]``: mean over heads of the attention that one query pays to patches."""
        weights = self.weights[image, layer, :, query].float() / 255 * self.maxima[image, layer, :, query, None]
        return weights.mean(0).unflatten(0, tuple(self.grid))

    def query_at(self, row: int, column: int) -> int:
        """The place in ``queries`` of the stored patch next to one of the grid."""
        near = (row // self.stride * self.stride) * self.grid[1] + column // self.stride * self.stride
        return self.queries.index(self.num_prefix + near)

    def for_page(self, name: str) -> dict[str, Any]:
        """What the viewer's script reads: sizes, and everything else as deflated base64."""
        parts = (self.weights, self.maxima, self.prefix)
        content = b"".join(part.contiguous().numpy().tobytes() for part in parts)
        return {
            "name": name,
            "grid": self.grid,
            "prefix": self.num_prefix,
            "cls": self.has_cls and self.num_prefix > 0,
            "queries": self.queries,
            "stride": self.stride,
            "shape": list(self.weights.shape),
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


@torch.no_grad()
def attention_maps(encoder: FrozenEncoder, images: Tensor) -> Maps | None:
    """Rows of every layer and head on `images` ``[I, C, S, S]`` uint8; None where patches form no grid.

    Layers of other tokens than the first, such as windows, are left out.
    """
    if encoder.grid is None:
        return None
    device = next(encoder.parameters()).device
    with capture(encoder.model, ["peak"], accumulate=True, keep=("q", "k")) as heads:
        encoder(images.to(device))
    tokens = encoder.num_prefix + encoder.grid[0] * encoder.grid[1]
    layers = [
        layer
        for layer in heads.values()
        if layer.q is not None and layer.queries == layer.keys == tokens and len(layer.q) == len(images)
    ]
    layers = [layer for layer in layers if layer.heads == layers[0].heads]
    if not layers:
        return None
    queries, stride = queries_of(encoder.grid, encoder.num_prefix, len(images) * len(layers) * layers[0].heads * tokens)
    weights, maxima, prefix = [], [], []
    for layer in layers:
        assert layer.q is not None and layer.k is not None
        rows = attention_rows(layer.q, layer.k, queries, **layer.options).cpu()  # [I, H, Q, N]
        patches = rows[..., encoder.num_prefix :]
        highest = patches.amax(-1)
        weights.append((255 * patches / highest.clamp(min=1e-30)[..., None]).round().to(torch.uint8))
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
