"""What tokens of an image are like among each other: how alike, and how fine the pattern over the image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mimkernels.ops import _checks

__all__ = ["high_frequency", "relative_log_amplitude", "token_similarity"]


def token_similarity(tokens: Tensor, num_prefix: int = 0) -> Tensor:
    """How alike the patch tokens of an image are: the mean cosine of all pairs of two different ones.

    Args:
        tokens: ``[B, N, D]``.
        num_prefix: leading tokens that are no patches; left out.

    Returns:
        ``[B]`` fp32: 1 where all point one way, 0 for orthogonal ones; NaN for a single patch. Time and memory linear
        in N: pairs are never made.

    Source: the cosine similarity of tokens in arXiv:2305.00729.
    """
    x = _patches("token_similarity", tokens, num_prefix)
    count = x.shape[1]
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1)  # [B, N]
    scales = norms.clamp(min=1e-12).reciprocal()
    with torch.autocast(x.device.type, enabled=False):
        total = (scales[:, None] @ x)[:, 0]  # [B, D] sum of the tokens at length 1, which are never made
    # Its squared norm holds every ordered pair once, and every token with itself.
    among = total.square().sum(-1) - (norms * scales).square().sum(1)
    return among / (count * (count - 1)) if count > 1 else torch.full_like(among, math.nan)


def relative_log_amplitude(tokens: Tensor, grid: Sequence[int] | None = None, num_prefix: int = 0) -> Tensor:
    """The amplitudes of frequencies in the map of patch tokens, relative to that of frequency 0.

    ``log(|F(f, f)| + 1e-6) - log(|F(0, 0)| + 1e-6)`` of the 2-D Fourier transform of every channel, mean over channels.

    Args:
        tokens: ``[B, N, D]``.
        grid: rows and columns of patches; a square one if None.
        num_prefix: leading tokens that are no patches; left out.

    Returns:
        ``[B, F]`` fp32, along the diagonal from frequency 0 (which is 0) to the highest, pi for an even side.

    Raises:
        ValueError: the patches do not fill the grid.

    Source: arXiv:2305.00729 and arXiv:2202.06709, whose code adds 1e-6.
    """
    return _relative_log_amplitude(_patches("relative_log_amplitude", tokens, num_prefix), grid, highest=False)


def high_frequency(tokens: Tensor, grid: Sequence[int] | None = None, num_prefix: int = 0) -> Tensor:
    """The last of what ``relative_log_amplitude`` gives, ``[B]`` fp32: the highest frequency alone."""
    return _relative_log_amplitude(_patches("high_frequency", tokens, num_prefix), grid, highest=True)[:, -1]


def _patches(op: str, tokens: Tensor, num_prefix: int) -> Tensor:
    """The patch tokens in fp32."""
    _checks.has_rank(op, "tokens", tokens, 3)
    _checks.is_real(op, "tokens", tokens)
    _checks.prefix_count(op, num_prefix, tokens.shape[1])
    return tokens[:, num_prefix:].float()


def _relative_log_amplitude(x: Tensor, grid: Sequence[int] | None, *, highest: bool) -> Tensor:
    """``[B, F]`` of patches ``[B, N, D]``; `highest`: of frequency 0 and the highest one."""
    side = math.isqrt(x.shape[1])
    if grid is not None and (not isinstance(grid, Sequence) or len(grid) != 2):
        raise ValueError(f"grid must be (rows, columns) of patches, got {grid!r}")
    rows, columns = (side, side) if grid is None else grid
    if rows * columns != x.shape[1]:
        raise ValueError(f"{x.shape[1]} patches do not fill a grid of {rows} x {columns}")
    steps = min(rows, columns) // 2
    # The same share of the highest frequency on both axes. Of the transform that is the diagonal alone: products with
    # F waves, far less than all N frequencies.
    number = torch.arange(steps + 1, device=x.device)
    if highest:
        number = number[[0, -1]]
    turns = _turns(number * (rows // 2) // max(1, steps), rows)[:, :, None]
    turns = turns + _turns(number * (columns // 2) // max(1, steps), columns)[:, None]
    angles = 2 * math.pi * turns.flatten(1)  # [F, N]
    waves = torch.cat((angles.cos(), angles.sin()))
    with torch.autocast(x.device.type, enabled=False):
        real, imaginary = (waves @ x).unflatten(1, (2, -1)).unbind(1)  # [B, F, D] each
    amplitude: Tensor = (torch.hypot(real, imaginary) + 1e-6).log().mean(-1)
    return amplitude - amplitude[:, :1]


def _turns(frequencies: Tensor, length: int) -> Tensor:
    """``[F, length]`` fp32: ``f * i / length`` of every wave at every place, less whole turns."""
    return (frequencies[:, None] * torch.arange(length, device=frequencies.device)) % length / length
