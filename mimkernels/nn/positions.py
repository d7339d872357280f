"""Fixed sine-cosine positions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mimkernels.ops._checks import count, integer

__all__ = ["sincos_positions_2d"]


def sincos_positions_2d(dim: int, grid: tuple[int, int], num_prefix: int = 0) -> Tensor:
    """The fixed 2-D positions of MAE: column first, then row, each as sines and then cosines.

    Args:
        dim: width D, a multiple of 4 (two axes, sine and cosine of each).
        grid: rows and columns of patches.
        num_prefix: rows of zeros put first, for prefix tokens.

    Returns:
        ``[1, num_prefix + rows * columns, D]`` fp32.

    Source: arXiv:2111.06377 and its code; frequencies 10000^(-4k/D), k = 0 ... D/4 - 1.
    """
    op = "sincos_positions_2d"
    integer(op, "dim", dim)
    count(op, "num_prefix", num_prefix)
    if not isinstance(grid, Sequence) or len(grid) != 2 or not all(isinstance(size, int) and size > 0 for size in grid):
        raise ValueError(f"{op}: grid must be (rows, columns) of patches, got {grid!r}")
    if dim <= 0 or dim % 4 != 0:
        raise ValueError(f"2-D sine-cosine positions need a width that is a multiple of 4, got {dim}")
    rows, columns = grid
    # In float64, as published: float32 angles of the high frequencies would differ in the last bits.
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row_angles = torch.outer(torch.arange(rows, dtype=torch.float64), frequencies)
    column_angles = torch.outer(torch.arange(columns, dtype=torch.float64), frequencies)
    by_row = torch.cat((row_angles.sin(), row_angles.cos()), dim=1)  # [rows, D/2]
    by_column = torch.cat((column_angles.sin(), column_angles.cos()), dim=1)  # [columns, D/2]
    table = torch.cat(
        (
            by_column[None, :, :].expand(rows, columns, dim // 2),
            by_row[:, None, :].expand(rows, columns, dim // 2),
        ),
        dim=2,
    ).reshape(rows * columns, dim)
    return torch.cat((table.new_zeros(num_prefix, dim), table)).float().unsqueeze(0)
