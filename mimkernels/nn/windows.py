"""Windows of attention: which tokens of the image's grid each of them holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Windows", "pair", "window_counts", "window_positions", "windows_of"]


class Windows(NamedTuple):
    """How a layer cuts its tokens into windows, as Swin does: rolled back by the shift, then padded to whole windows.

    Attributes:
        grid: rows and columns of tokens.
        size: of a window.
        shift: rows and columns by which windows are shifted; those at the bottom and right edge go on at the top and
            left edge.
    """

    grid: tuple[int, int]
    size: tuple[int, int]
    shift: tuple[int, int] = (0, 0)

    @property
    def padded(self) -> tuple[int, int]:
        """The grid in whole windows."""
        rows, columns = (-(-length // side) * side for length, side in zip(self.grid, self.size, strict=True))
        return rows, columns

    @property
    def number(self) -> int:
        """Windows per image."""
        rows, columns = (length // side for length, side in zip(self.padded, self.size, strict=True))
        return rows * columns

    def ids(self, device: torch.device | None = None) -> Tensor:
        """``[nW, N]``: where each token of each window lies in the padded grid, row by row.

        Padding lies below and to the right of the image, shifted or not.
        """
        axes = []
        for length, whole, shift in zip(self.grid, self.padded, self.shift, strict=True):
            place = torch.arange(whole, device=device)
            axes.append(torch.where(place < length, (place + shift) % max(1, length), place))
        places = axes[0][:, None] * self.padded[1] + axes[1]
        (height, width), (rows, columns) = self.size, self.padded
        cut = places.reshape(rows // height, height, columns // width, width)
        return cut.transpose(1, 2).reshape(self.number, height * width)

    def positions(self, device: torch.device | None = None) -> Tensor:
        """``[nW, N, 2]`` rows and columns of the tokens in the image's grid."""
        ids, columns = self.ids(device), self.padded[1]
        return torch.stack((ids // columns, ids % columns), dim=-1).float()


def windows_of(module: nn.Module) -> Windows | None:
    """The windows that a block of Swin cuts its tokens into; None if it tells of none."""
    grid, size, shift = (
        pair(getattr(module, name, None)) for name in ("input_resolution", "window_size", "shift_size")
    )
    if grid is None or size is None or shift is None or min(*grid, *size) < 1:
        return None
    return Windows(grid, size, shift)


def window_positions(modules: Iterable[nn.Module], layers: Sequence[nn.Module]) -> list[Tensor | None]:
    """Where the tokens of layers in windows lie in the image's grid, ``[nW, N, 2]`` each; None for other layers.

    Of models that take images of any size, where they lie in their window, ``[1, N, 2]``.

    Args:
        modules: in which the layers are, with the blocks that cut windows.
    """
    found: dict[nn.Module, Windows] = {}
    for block, windows in _windows_of_blocks(modules):
        if getattr(block, "dynamic_mask", False):  # images of any size: places within a window are as far apart
            windows = Windows(windows.size, windows.size)
        found.update((part, windows) for part in block.modules())
    return [found[layer].positions(next(layer.parameters()).device) if layer in found else None for layer in layers]


def window_counts(modules: Iterable[nn.Module], layers: Sequence[nn.Module]) -> list[int]:
    """Windows per image that each layer runs in, for images of the model's size; 1 of layers without windows.

    Args:
        modules: in which the layers are, with the blocks that cut windows.
    """
    found = {part: windows.number for block, windows in _windows_of_blocks(modules) for part in block.modules()}
    return [found.get(layer, 1) for layer in layers]


def _windows_of_blocks(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, Windows]]:
    for module in modules:
        for block in module.modules():
            windows = windows_of(block)
            if windows is not None:
                yield block, windows


def pair(value: object) -> tuple[int, int] | None:
    """Rows and columns from one number or two."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, Sequence) and len(value) == 2 and all(isinstance(size, int) for size in value):
        return value[0], value[1]
    return None
