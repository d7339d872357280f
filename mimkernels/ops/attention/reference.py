from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mimkernels.ops import _checks

# As in csrc/ops/attention/params.h.
LEAST_PATCH_MASS = 1e-30  # of a row that has a patch entropy
LARGE_LSE = 16.0  # whose rounding is found again
LARGEST_LOGIT_SCALE = math.log(100.0)
ROWS = 256  # queries that the companions take at a time, so that memory stays linear in N


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    key_mask: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
    num_prefix: int,
    positions: Tensor | None,
    stats: Iterable[str],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Materialised attention: out ``[B, H, Nq, D]``, lse ``[B, H, Nq]`` and the asked statistics."""
    check_index("attention", bias_table, bias_index)
    s = scores(q, k, bias, bias_table, bias_index, key_mask, logit_scale, scale)  # [B, H, Nq, Nk], at least fp32
    x, top = below_maximum(s)
    log_p, log_sum = log_softmax(x)
    p = log_p.exp()
    with _checks.without_autocast(q):
        out = p.to(q.dtype) @ v
    lse = torch.where((x == float("-inf")).all(-1), float("-inf"), top.squeeze(-1) + log_sum.squeeze(-1))
    made = {name: _STATISTICS[name](s, log_p, p, num_prefix, positions) for name in stats}
    return out, lse, made


def check_index(op: str, bias_table: Tensor | None, bias_index: Tensor | None) -> None:
    """Refuse a bias_index that is out of range of its table, on CPU tensors."""
    if bias_table is not None and bias_index is not None:
        _checks.in_range(op, "bias_index", bias_index, bias_table.shape[0])


def scores(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    key_mask: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
) -> Tensor:
    """``scale * q k^T + bias + bias_table[bias_index]``, -inf on masked keys; q and k as cosine attention takes them
    if ``logit_scale`` is given."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with _checks.without_autocast(q):  # which would round the product to half precision
        if logit_scale is None:
            s = (q.to(wide) @ k.to(wide).transpose(-2, -1)) * scale
        else:
            cosines = normalize(q.to(wide), dim=-1) @ normalize(k.to(wide), dim=-1).transpose(-2, -1)
            s = cosines * (logit_scale.clamp(max=LARGEST_LOGIT_SCALE).exp()[:, None, None] * scale)
    if bias_table is not None and bias_index is not None:
        s = s + bias_table.to(wide)[bias_index].permute(2, 0, 1)  # [H, Nq, Nk], whose gradient is summed in wide
    if bias is not None:
        s = add_windows(s, bias)
    if key_mask is not None:
        s = s.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    return s


def add_windows(s: Tensor, bias: Tensor) -> Tensor:
    """Scores ``[B, H, Nq, Nk]`` plus a bias ``[W, H or 1, Nq, Nk]``, whose row ``b % W`` image b takes."""
    batch, windows = s.shape[0], bias.shape[0]
    if windows in (1, batch):
        return s + bias
    return (s.reshape(batch // windows, windows, *s.shape[1:]) + bias).flatten(0, 1)


def below_maximum(s: Tensor) -> tuple[Tensor, Tensor]:
    """Scores less their row's largest, where huge ones cancel, and that one ``[..., 1]``, or 0 where it is infinite."""
    top = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_zeros((*s.shape[:-1], 1))
    top = torch.where(top.isinf(), 0.0, top)
    return s - top, top


def log_softmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax of scores of moderate size, and the log of their sum ``[..., 1]``.

    A row whose keys are all masked is -inf throughout, its log sum 0, and its gradients are 0 (torch's are NaN).
    """
    total = x.exp().sum(-1, keepdim=True)
    log_sum = torch.where(total == 0, 1.0, total).log()
    return x - log_sum, log_sum


def probabilities(s: Tensor) -> Tensor:
    """softmax(s), 0 in rows where every key is masked."""
    return log_softmax(below_maximum(s)[0])[0].exp()


def log_probabilities(s: Tensor, lse: Tensor) -> Tensor:
    """log softmax(s) from ``lse [B, H, Nq]``; what rounding took from a large one is found again."""
    lse = lse[..., None]
    x, top = below_maximum(s)
    low = (top - lse) + log_softmax(x)[1]
    large = lse.isfinite() & (lse.abs() > LARGE_LSE)
    return (s - torch.where(lse == float("-inf"), 0.0, lse)) - torch.where(large, low, 0.0)


def expected(p: Tensor, values: Tensor) -> Tensor:
    """Sum of p times values; those of keys that have no p may be infinite, or too large to be multiplied."""
    return (p * values.masked_fill(p == 0, 0.0)).sum(-1)


def _entropy(s: Tensor, log_p: Tensor, p: Tensor, num_prefix: int, positions: Tensor | None) -> Tensor:
    return -expected(p, log_p)


def _prefix_mass(s: Tensor, log_p: Tensor, p: Tensor, num_prefix: int, positions: Tensor | None) -> Tensor:
    return p[..., :num_prefix].sum(-1)


def _self_mass(s: Tensor, log_p: Tensor, p: Tensor, num_prefix: int, positions: Tensor | None) -> Tensor:
    return p.diagonal(dim1=-2, dim2=-1)


def _distance(s: Tensor, log_p: Tensor, p: Tensor, num_prefix: int, positions: Tensor | None) -> Tensor:
    assert positions is not None
    places = with_prefix_rows(positions.to(p.dtype), num_prefix, p.shape[-1])
    d = distances(places, num_prefix)  # [B or 1, Nq, Nk]
    return (p * d[:, None]).sum(-1)


def _patch_entropy(s: Tensor, log_p: Tensor, p: Tensor, num_prefix: int, positions: Tensor | None) -> Tensor:
    log_q, _ = log_softmax(below_maximum(s[..., num_prefix:])[0])
    few = p[..., num_prefix:].sum(-1) < LEAST_PATCH_MASS
    return torch.where(few, 0.0, -expected(log_q.exp(), log_q))


def _patch_mass(s: Tensor, log_p: Tensor, p: Tensor, num_prefix: int, positions: Tensor | None) -> Tensor:
    return p[..., num_prefix:].sum(-1)


def _peak(s: Tensor, log_p: Tensor, p: Tensor, num_prefix: int, positions: Tensor | None) -> Tensor:
    return p.detach().amax(-1) if p.shape[-1] else p.new_zeros(p.shape[:-1])


def _max_score(s: Tensor, log_p: Tensor, p: Tensor, num_prefix: int, positions: Tensor | None) -> Tensor:
    return s.detach().amax(-1) if s.shape[-1] else s.new_full(s.shape[:-1], float("-inf"))


def _argmax(s: Tensor, log_p: Tensor, p: Tensor, num_prefix: int, positions: Tensor | None) -> Tensor:
    top = _max_score(s, log_p, p, num_prefix, positions)
    if s.shape[-1] == 0:
        return torch.full(top.shape, -1, device=s.device)
    # torch.argmax promises the first of several.
    return torch.where(top > float("-inf"), s.detach().argmax(-1), -1)


_STATISTICS = {
    "entropy": _entropy,
    "prefix_mass": _prefix_mass,
    "self_mass": _self_mass,
    "distance": _distance,
    "patch_entropy": _patch_entropy,
    "peak": _peak,
    "patch_mass": _patch_mass,
    "max_score": _max_score,
    "argmax": _argmax,
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
