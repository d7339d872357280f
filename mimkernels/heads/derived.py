"""Numbers per image and head, from row statistics and from the ops that go back from lse to probabilities."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mimkernels.ops import _checks, attention_rows, head_divergence, received_attention

__all__ = [
    "eps_patch_entropy",
    "normalized_entropy",
    "normalized_mutual_information",
    "patch_head_divergence",
    "patch_nmi",
    "per_head_divergence",
    "query_mean",
    "region_entropy",
    "renormalized_distance",
]

# A bias up to which a key is hidden: timm's masks of windows are -100, which leaves nothing of a probability in fp32.
HIDDEN = -50.0
ROWS = 128  # queries at a time where probabilities are made, so that memory stays linear in N


def query_mean(rows: Tensor, num_prefix: int = 0, *, exclude_prefix: bool = True) -> Tensor:
    """Mean over queries of a row statistic.

    Args:
        rows: ``[B, H, N]``.
        num_prefix: leading tokens that are no patches.
        exclude_prefix: leave the prefix queries out of the mean.

    Returns:
        ``[B, H]``, one number per image and head.
    """
    _checks.has_rank("query_mean", "rows", rows, 3)
    _checks.is_float("query_mean", "rows", rows)
    _checks.count("query_mean", "num_prefix", num_prefix)
    first = num_prefix if exclude_prefix else 0
    if rows.shape[-1] <= first:
        raise ValueError(
            f"a mean over patch queries needs patches: {rows.shape[-1]} tokens, {num_prefix} of them prefix"
        )
    return rows[..., first:].mean(-1)


def renormalized_distance(distance: Tensor, patch_mass: Tensor) -> Tensor:
    """Attention distance of rows renormalised over patches, ``distance_i / M_i``.

    Args:
        distance, patch_mass: ``[B, H, N]`` row statistics of ``attention``.

    Returns:
        ``[B, H, N]``, 0 where a row has no mass on patches.

    Source: the presets ``park`` (arXiv:2305.00729) and ``walmer`` (arXiv:2212.03862).
    """
    for name, row in (("distance", distance), ("patch_mass", patch_mass)):
        _checks.has_rank("renormalized_distance", name, row, 3)
    if distance.shape != patch_mass.shape:
        raise ValueError(
            f"renormalized_distance: distance {_checks.shape(distance)} and patch_mass {_checks.shape(patch_mass)} "
            "must have the same shape"
        )
    return torch.where(patch_mass > 0, distance / torch.where(patch_mass > 0, patch_mass, 1.0), 0.0)


def normalized_entropy(entropy: Tensor, bias: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
    """Entropies as a share of the largest that there could be, ``H_i / log n_i``, which compare between layers.

    Args:
        entropy: ``[B, H, N]`` of self-attention, nats.
        bias, key_mask: as given to ``attention``. Keys that they hide from a query, such as those that the mask of
            Swin's shifted windows cuts off, are not among its n_i.

    Returns:
        ``[B, H, N]``; 0 where ``n_i`` is below 2.
    """
    op = "normalized_entropy"
    _checks.has_rank(op, "entropy", entropy, 3)
    _checks.is_float(op, "entropy", entropy)
    batch, heads, tokens = entropy.shape
    if bias is not None:
        _checks.has_rank(op, "bias", bias, 3, 4)
        *windows, of_heads, queries, keys = bias.shape
        if of_heads not in (1, heads) or (queries, keys) != (tokens, tokens) or not _divides(windows, batch):
            raise ValueError(
                f"{op}: bias {_checks.shape(bias)} must be [W, H or 1, N, N], W a divisor of B, for entropy "
                f"[B, H, N] = {_checks.shape(entropy)}"
            )
    if key_mask is not None:
        _checks.has_rank(op, "key_mask", key_mask, 2)
        if tuple(key_mask.shape) != (batch, tokens):
            raise ValueError(
                f"{op}: key_mask {_checks.shape(key_mask)} must be [B, N] for entropy {_checks.shape(entropy)}"
            )
    counts = entropy.new_full((1, 1, 1), tokens)
    if bias is not None:
        allowed = (bias if bias.dim() == 4 else bias[None]) > HIDDEN  # [W, H or 1, N, N]
        if key_mask is not None:
            allowed = allowed.repeat(batch // len(allowed), 1, 1, 1) & key_mask[:, None, None, :]
        counts = allowed.sum(-1).to(entropy.dtype)  # [W, H or 1, N]
        counts = counts.repeat(batch // len(counts), 1, 1)
    elif key_mask is not None:
        counts = key_mask.sum(-1).to(entropy.dtype)[:, None, None]
    return torch.where(counts > 1, entropy / counts.clamp(min=2).log(), 0.0)


def _divides(windows: list[int], batch: int) -> bool:
    return not windows or windows[0] == 1 or (windows[0] > 0 and batch % windows[0] == 0)


def region_entropy(bias: Tensor) -> Tensor:
    """How much of its key a query knows by a mask alone, ``[W, H or 1]`` nats: ``log N - mean_i log n_i``.

    Args:
        bias: ``[W, H or 1, N, N]`` or ``[H or 1, N, N]``.

    Returns:
        the entropy of the region that a query is in, where the bias cuts the tokens into regions that do not see each
        other, as the mask of Swin's shifted windows does; 0 where it hides none, or others.
    """
    _checks.has_rank("region_entropy", "bias", bias, 3, 4)
    allowed = (bias if bias.dim() == 4 else bias[None]) > HIDDEN
    counts = allowed.sum(-1)
    first = allowed.byte().argmax(-1)  # of the keys that a query sees: the region's name
    regions = (allowed == (first[..., None] == first[..., None, :])).all(-1).all(-1) & (counts > 0).all(-1)
    entropy = math.log(max(1, bias.shape[-1])) - counts.clamp(min=1).double().log().mean(-1)
    return torch.where(regions, entropy.clamp(min=0.0), 0.0)


def normalized_mutual_information(received: Tensor, entropy: Tensor, regions: Tensor | None = None) -> Tensor:
    """Mutual information between queries and keys, normalised: 0 if all queries attend alike, 1 for a permutation.

    With ``p(q) = 1/N`` and ``p_k`` the column means: ``I = H(p_k) - mean_i H_i``, ``NMI = I / sqrt(log N * H(p_k))``.

    Args:
        received: ``[B, H, N]`` column means of the attention, from ``received_attention``.
        entropy: ``[B, H, Nq]`` entropies of its rows, nats.
        regions: ``[B, H or 1]`` from ``region_entropy``: what a mask alone tells is taken from I, from ``log N`` and
            from ``H(p_k)``, so that the information is that within a region.

    Returns:
        ``[B, H]``; 0 where ``H(p_k)`` or ``log N`` is 0.

    Source: Park et al. 2023, arXiv:2305.00729, which adds 1e-8 to every weight first.
    """
    for name, row in (("received", received), ("entropy", entropy)):
        _checks.has_rank("normalized_mutual_information", name, row, 3)
    received, entropy = received.double(), entropy.double()  # a difference of near equals in collapsed heads
    by_mask = 0.0 if regions is None else regions.double()
    key_entropy = torch.special.entr(received).sum(-1) - by_mask
    information = (key_entropy - entropy.mean(-1)).clamp(min=0.0)
    # H(p_k) that is rounding alone would divide rounding by rounding.
    norm = (math.log(max(1, entropy.shape[-1])) - by_mask) * key_entropy
    return torch.where(norm > 1e-9, information / norm.clamp(min=1e-9).sqrt(), 0.0)


def patch_lse(lse: Tensor, patch_mass: Tensor) -> Tensor:
    """Log-sum-exp over patch keys only: with it, the ops see attention renormalised over patches."""
    return lse + patch_mass.log()


def _patches_only(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    patch_mass: Tensor,
    num_prefix: int,
    bias: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """The inputs of a companion op for ``A[P:, P:]`` with rows renormalised; views, no copies."""
    tensors = q[:, :, num_prefix:], k[:, :, num_prefix:], patch_lse(lse, patch_mass)[:, :, num_prefix:]
    return tensors, {
        "bias": None if bias is None else bias[..., num_prefix:, num_prefix:],
        "bias_table": bias_table,
        "bias_index": None if bias_index is None else bias_index[num_prefix:, num_prefix:],
        "key_mask": None if key_mask is None else key_mask[:, num_prefix:],
    }


def patch_nmi(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    patch_entropy: Tensor,
    patch_mass: Tensor,
    num_prefix: int = 0,
    *,
    bias: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias_index: Tensor | None = None,
    key_mask: Tensor | None = None,
    logit_scale: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Normalised mutual information of patch queries and patch keys, rows renormalised.

    Args:
        q, k: ``[B, H, N, D]``.
        lse, patch_entropy, patch_mass: ``[B, H, N]`` from ``attention`` with the same arguments.
        num_prefix: leading tokens that are no patches; dropped as queries and as keys.
            What a bias that cuts the tokens into regions tells by itself does not count; see ``region_entropy``.
        bias, bias_table, bias_index, key_mask, logit_scale, scale, backend: as in ``attention``.

    Returns:
        ``[B, H]``, from 0 (every query attends alike) to 1 (a permutation).

    Source: Park et al. 2023, arXiv:2305.00729, which adds 1e-8 to every weight first.
    """
    tensors, options = _patches_only(q, k, lse, patch_mass, num_prefix, bias, bias_table, bias_index, key_mask)
    received = received_attention(*tensors, **options, logit_scale=logit_scale, scale=scale, backend=backend)
    cut, regions = options["bias"], None
    if cut is not None:
        regions = region_entropy(cut)
        regions = regions.repeat(len(q) // len(regions), 1)
    return normalized_mutual_information(received, patch_entropy[..., num_prefix:], regions)


def patch_head_divergence(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    patch_mass: Tensor,
    num_prefix: int = 0,
    *,
    bias: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias_index: Tensor | None = None,
    key_mask: Tensor | None = None,
    logit_scale: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """``head_divergence`` without prefix tokens: patch queries, patch keys, rows renormalised.

    Args and errors as ``head_divergence``; ``patch_mass`` is the row statistic of the same ``attention`` call.

    Returns:
        ``[B, H, H]`` in nats, entry (h, g) is ``KL(P^h || P^g)``.
    """
    tensors, options = _patches_only(q, k, lse, patch_mass, num_prefix, bias, bias_table, bias_index, key_mask)
    return head_divergence(*tensors, **options, logit_scale=logit_scale, scale=scale, backend=backend)


def per_head_divergence(divergence: Tensor, *, symmetrize: bool = False) -> Tensor:
    """How far each head is from the others of its layer: the mean over ``g != h`` of ``KL(P^h || P^g)``.

    Args:
        divergence: ``[B, H, H]`` from ``head_divergence``.
        symmetrize: mean of both directions instead. The mean over heads is the same either way.

    Returns:
        ``[B, H]`` nats; NaN for a single head, which has no other.

    Source: this library's definition for the head diversity of arXiv:2205.13543.
    """
    _checks.has_rank("per_head_divergence", "divergence", divergence, 3)
    if symmetrize:
        divergence = (divergence + divergence.transpose(-1, -2)) / 2
    return (
        divergence.sum(-1) / (divergence.shape[-1] - 1) if divergence.shape[-1] > 1 else divergence[..., 0] * math.nan
    )


def eps_patch_entropy(
    q: Tensor,
    k: Tensor,
    num_prefix: int = 0,
    *,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias_index: Tensor | None = None,
    key_mask: Tensor | None = None,
    logit_scale: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Patch entropy exactly as Beyond-[cls] prints it: ``w = A_ij / (M_i + eps)``, ``-sum_j w log(w + eps)``.

    Args:
        q, k: ``[B, H, N, D]``.
        num_prefix: leading tokens that are no patches; left out of the sums.
        eps: in the denominator and inside the logarithm.
        bias, bias_table, bias_index, key_mask, logit_scale, scale: as in ``attention``.

    Returns:
        ``[B, H, N]`` nats, of every query. Made from blocks of attention rows: memory linear in N, time that of a
        plain attention.

    Source: arXiv:2412.03215.
    """
    entropies = []
    for first in range(0, q.shape[2], ROWS):
        rows = torch.arange(first, min(first + ROWS, q.shape[2]), device=q.device)
        a = attention_rows(
            q,
            k,
            rows,
            bias=bias,
            bias_table=bias_table,
            bias_index=bias_index,
            key_mask=key_mask,
            logit_scale=logit_scale,
            scale=scale,
        )
        entropies.append(_eps_entropy(a[..., num_prefix:], eps))
    return torch.cat(entropies, dim=-1)


def _eps_entropy(a: Tensor, eps: float) -> Tensor:
    w = a / (a.sum(-1, keepdim=True) + eps)
    return -(w * (w + eps).log()).sum(-1)


def beyond_cls_rows(name: str, rows: dict[str, Tensor], num_prefix: int, eps: float) -> Tensor:
    """One of the eight Beyond-[cls] numbers from row statistics ``[B, H, N]``, as ``[B, H]``.

    The entropies are those of ``w = A_ij / (M_i + eps)`` without the eps inside the logarithm: with
    ``r = M_i / (M_i + eps)`` that is ``r * patch_entropy_i - r log r``, within ``N * eps`` of the published value
    however small ``M_i`` is.
    """

    def cls(row: Tensor) -> Tensor:
        return row[..., 0]

    def pos(row: Tensor) -> Tensor:
        return query_mean(row, num_prefix)

    if name == "cls_cls_attention":
        return cls(rows["self_mass"])
    if name == "pos_self_attention":
        return pos(rows["self_mass"])
    if name == "cls_cls_attention_adj":
        return cls(rows["self_mass"]) / (cls(rows["patch_mass"]) + eps)
    if name == "pos_self_attention_adj":
        return pos(rows["self_mass"] / (rows["patch_mass"] + eps))
    if name == "cls_pos_attention":
        return cls(rows["patch_mass"]) / (rows["patch_mass"].shape[-1] - num_prefix)
    if name == "pos_cls_attention":
        return pos(rows["prefix_mass"])
    if "eps_patch_entropy" in rows:
        entropy = rows["eps_patch_entropy"]
    else:
        share = rows["patch_mass"] / (rows["patch_mass"] + eps)
        entropy = share * rows["patch_entropy"] + torch.special.entr(share)
    return cls(entropy) if name == "cls_pos_entropy" else pos(entropy)
