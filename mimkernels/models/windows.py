"""Relative positions of a checkpoint in a model with other windows or another resolution, as published."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["FormerWindows", "resize_tables"]

_TABLE = "relative_position_bias_table"
_COORDINATES = "relative_coords_table"
_LEAST = 3  # tokens a side of a window from which a table has the four points that a cubic spline needs

_Window = tuple[int, int]


def resize_tables(weights: Mapping[str, Tensor], encoder: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Published weights with their tables of relative positions as large as the encoder's, and what was resized.

    A table is a picture of (2h - 1) x (2w - 1) relative positions for windows of h x w tokens; rows beyond are those
    of the [cls] token and stay as they are. Its entries are placed in geometric progression, near positions where they
    were and the farthest at the new window's border, and read at whole positions by bicubic splines.

    Raises:
        ValueError: a table is of no square window, or of one too small for splines; names it and both sides.
    """
    resized, told = dict(weights), []
    for name, module in _with(encoder, _TABLE):
        table, ours, window = weights.get(f"{name}.{_TABLE}"), getattr(module, _TABLE), _pair(module.window_size)
        if not _is_plain(table, 2) or len(table) == len(ours) or table.shape[1] != ours.shape[1]:
            continue  # what else differs is for the check of names and shapes
        extra = len(ours) - math.prod(2 * side - 1 for side in window)
        rows = math.isqrt(max(len(table) - extra, 0))
        former = (rows + 1) // 2
        where = f"{name}.{_TABLE}: {len(table)} relative positions in the checkpoint, {len(ours)} in the model"
        if rows * rows != len(table) - extra or rows % 2 == 0:
            raise ValueError(
                f"{where}, whose window is {_by(window)} tokens; those of the checkpoint are of no square window, "
                "which alone is resized; nothing was loaded. Build the model with the checkpoint's window and image "
                "size"
            )
        if former < _LEAST:
            raise ValueError(
                f"{where}: a window of {_by((former, former))} tokens is too small to be resized to {_by(window)}, "
                f"bicubic interpolation needs {_by((_LEAST, _LEAST))}; nothing was loaded"
            )
        resized[f"{name}.{_TABLE}"] = _resized(table, rows, window, extra)
        told.append(f"{name}.{_TABLE}: {_by((former, former))} to {_by(window)} tokens")
    return resized, told


class FormerWindows:
    """The windows that a checkpoint of Swin V2 was trained with: its coordinates are scaled by them, nothing resized.

    Args:
        buffers: what the checkpoint holds besides weights, by published name; without tables of coordinates, as in
            timm's own, nothing is known and the model keeps its ``pretrained_window_sizes``.
        encoder: the model's.
    """

    def __init__(self, buffers: Mapping[str, Tensor], encoder: nn.Module) -> None:
        self._encoder = encoder
        self._windows: list[tuple[str, Any, _Window]] = []
        for name, module in _with(encoder, _COORDINATES):
            table = buffers.get(f"{name}.{_COORDINATES}")
            if not _is_plain(table, 4) or table.shape[-1] != 2 or not table.numel():
                continue
            former = _scaled_by(table)
            if former != _scaled_by(getattr(module, _COORDINATES)):
                self._windows.append((name, module, former))

    def told(self) -> list[str]:
        """What ``apply`` changes."""
        return [f"{name}: {_by(former)} to {_by(module.window_size)} tokens" for name, module, former in self._windows]

    def apply(self, config: dict[str, Any] | None) -> None:
        """Scale the model's coordinates by these windows, and say so in the settings that it is built anew from."""
        for _, module, former in self._windows:
            module.pretrained_window_size = former
            module.relative_coords_table.copy_(_coordinates(_pair(module.window_size), former))
        if self._windows and config is not None:
            stages: Any = self._encoder.layers
            sides = [_pair(stage.blocks[0].attn.pretrained_window_size) for stage in stages]
            config["pretrained_window_sizes"] = [side[0] if side[0] == side[1] else list(side) for side in sides]


def _with(encoder: nn.Module, tensor: str) -> Iterator[tuple[str, Any]]:
    """Modules that have such a tensor, by published name."""
    for name, module in encoder.named_modules():
        if isinstance(getattr(module, tensor, None), Tensor):
            yield f"encoder.{name}", module


def _is_plain(table: Tensor | None, axes: int) -> TypeGuard[Tensor]:
    """Whether a checkpoint has such a table, with values that can be read."""
    return (
        table is not None
        and table.dim() == axes
        and table.is_floating_point()
        and table.layout == torch.strided
        and not table.is_meta
    )


def _coordinates(window: _Window, scaled_by: _Window) -> Tensor:
    """``[1, 2h - 1, 2w - 1, 2]``: ``sign(c) log2(8 |c| / (s - 1) + 1) / 3`` of relative positions c, windows s."""
    axes = [
        torch.arange(1 - side, side, dtype=torch.float32, device="cpu") / max(scale - 1, 1)
        for side, scale in zip(window, scaled_by, strict=True)
    ]
    scaled = 8 * torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)[None]
    return scaled.sign() * (scaled.abs() + 1).log2() / math.log2(8)


def _scaled_by(table: Tensor) -> _Window:
    """The windows s that such coordinates are scaled by."""
    window = []
    for axis in (0, 1):
        reach = (table.shape[1 + axis] - 1) // 2
        farthest = float(table[..., axis].max())
        # Outside of these bounds no window makes such coordinates, and nothing is told by them.
        window.append(round(1 + 8 * reach / (8**farthest - 1)) if 1e-3 < farthest < 8 else reach + 1)
    return window[0], window[1]


def _resized(table: Tensor, rows: int, window: _Window, extra: int) -> Tensor:
    from scipy.interpolate import RectBivariateSpline

    values = table.detach().to("cpu", torch.float64).numpy()
    positions, ends = values[: rows * rows].reshape(rows, rows, -1), values[rows * rows :]
    down, right = (np.arange(1 - side, side, dtype=np.float64) for side in window)
    places = [_progression(rows // 2, side - 1) for side in window]
    new = [RectBivariateSpline(*places, positions[..., head])(down, right) for head in range(positions.shape[2])]
    stacked = np.stack(new, axis=-1).reshape(-1, positions.shape[2])
    return torch.from_numpy(np.concatenate((stacked, ends))).to(table.device, table.dtype)


def _progression(count: int, reach: int) -> np.ndarray:
    """2 * `count` + 1 places around 0 whose distances grow by q in [1.01, 1.5], such that the last is at `reach`."""
    left, right = 1.01, 1.5
    while right - left > 1e-6:
        q = (left + right) / 2
        if (1 - q**count) / (1 - q) > reach:
            right = q
        else:
            left = q
    places = np.cumsum(q ** np.arange(count))
    return np.concatenate((-places[::-1], [0.0], places))


def _pair(size: Any) -> _Window:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _by(sizes: Any) -> str:
    return " x ".join(str(size) for size in _pair(sizes))
