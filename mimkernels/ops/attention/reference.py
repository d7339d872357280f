from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mimkernels.ops import _checks


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    num_prefix: int,
    positions: Tensor | None,
    stats: Iterable[str],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Materialised attention: out ``[B, H, Nq, D]``, lse ``[B, H, Nq]`` and the asked statistics."""
    s = scores(q, k, bias, key_mask, scale)  # [B, H, Nq, Nk], at least fp32
    lse = s.logsumexp(dim=-1)
    p = probabilities(s, lse)
    with _checks.without_autocast(q):
        out = p.to(q.dtype) @ v
    made = {name: _STATISTICS[name](s, p, lse, num_prefix, positions) for name in stats}
    return out, lse, made


def scores(q: Tensor, k: Tensor, bias: Tensor | None, key_mask: Tensor | None, scale: float) -> Tensor:
    """``scale * q k^T + bias``, -inf on masked keys."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with _checks.without_autocast(q):  # which would round the product to half precision
        s = (q.to(wide) @ k.to(wide).transpose(-2, -1)) * scale
    if bias is not None:
        s = s + bias
    if key_mask is not None:
        s = s.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    return s


def probabilities(s: Tensor, lse: Tensor) -> Tensor:
    """softmax(s), 0 in rows where every key is masked."""
    return (s - torch.where(lse == float("-inf"), 0.0, lse)[..., None]).exp()


def _entropy(s, p, lse, num_prefix, positions):
    return _lse_or_zero(lse) - _expected(s, p)


def _prefix_mass(s, p, lse, num_prefix, positions):
    return p[..., :num_prefix].sum(-1)


def _self_mass(s, p, lse, num_prefix, positions):
    return p.diagonal(dim1=-2, dim2=-1)


def _distance(s, p, lse, num_prefix, positions):
    positions = with_prefix_rows(positions.to(p.dtype), num_prefix, p.shape[-1])
    d = distances(positions, num_prefix)  # [B or 1, Nq, Nk]
    return (p * d[:, None]).sum(-1)


def _patch_entropy(s, p, lse, num_prefix, positions):
    mass = p[..., num_prefix:].sum(-1)
    here = mass > 0
    safe = torch.where(here, mass, 1.0)
    expected = _expected(s[..., num_prefix:], p[..., num_prefix:])
    return torch.where(here, _lse_or_zero(lse) + safe.log() - expected / safe, 0.0)


def _patch_mass(s, p, lse, num_prefix, positions):
    return p[..., num_prefix:].sum(-1)


def _peak(s, p, lse, num_prefix, positions):
    return p.detach().amax(-1) if p.shape[-1] else torch.zeros_like(lse)


_STATISTICS = {
    "entropy": _entropy,
    "prefix_mass": _prefix_mass,
    "self_mass": _self_mass,
    "distance": _distance,
    "patch_entropy": _patch_entropy,
    "peak": _peak,
    "patch_mass": _patch_mass,
}


def with_prefix_rows(positions: Tensor, num_prefix: int, tokens: int) -> Tensor:
    """Positions ``[N or N - P, d]``, or one of those per image, as ``[B or 1, N, d]``."""
    if positions.dim() == 2:
        positions = positions[None]
    if positions.shape[1] == tokens:
        return positions
    return torch.constant_pad_nd(positions, (0, 0, num_prefix, 0))


def distances(positions: Tensor, num_prefix: int) -> Tensor:
    """Euclidean distances ``[B or 1, N, N]`` between tokens, 0 on prefix rows and columns."""
    difference = positions[:, :, None] - positions[:, None]
    square = difference.square().sum(-1)
    patch = torch.arange(positions.shape[1], device=positions.device) >= num_prefix
    return torch.where(patch[:, None] & patch, square.sqrt(), 0.0)


def _expected(s: Tensor, p: Tensor) -> Tensor:
    # Masked keys have s = -inf and p = 0: they count nothing.
    return (p * s.masked_fill(s == float("-inf"), 0.0)).sum(-1)


def _lse_or_zero(lse: Tensor) -> Tensor:
    return torch.where(lse == float("-inf"), 0.0, lse)
