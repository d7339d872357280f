"""From tokens to one vector per image: the poolings that frozen features are probed with.

Every module takes tokens ``[B, N, D]``, prefix tokens first, and gives ``[B, D']``. Two rewritings keep the work per
token small, without changing a result: a projected key meets its query as ``q . (W_k x) = (W_k^T q) . x``, and a
projected value is projected once it is pooled, ``sum_n a_n W_v x_n = W_v sum_n a_n x_n``. So no ``D x D`` product runs
over tokens, only ``query_pool``.
"""

from __future__ import annotations

import difflib
import inspect
import math
import typing
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkernels.nn.positions import sincos_positions_2d
from mimkernels.ops import _checks, attention, attention_rows, query_pool, reduce_pool, weighted_pool

__all__ = ["Pooling", "build_pooling", "cls_attention", "poolings"]


class Pooling(nn.Module):
    """What all poolings share: the check of the input, and weights on request.

    Attributes:
        name, description: as in ``poolings()``.
        dim: width D of the tokens.
        out_dim: width D' of the pooled vector.
        num_prefix: P, leading tokens ([cls] first, registers) that are no patches.
        needs_cls_attention: whether ``forward`` needs ``cls_attention``.
        gives_weights: whether ``return_weights`` is possible.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    needs_cls_token: ClassVar[bool] = False
    gives_weights: ClassVar[bool] = True
    needs_cls_attention: bool = False

    def __init__(self, dim: int, num_prefix: int, out_dim: int | None = None) -> None:
        super().__init__()
        _checks.integer(self.name, "dim", dim)
        _checks.integer(self.name, "num_prefix", num_prefix)
        if dim < 1 or num_prefix < 0:
            raise ValueError(f"{self.name}: dim must be at least 1 and num_prefix at least 0, got {dim}, {num_prefix}")
        if self.needs_cls_token and num_prefix < 1:
            raise ValueError(f"{self.name} needs a [cls] token, but num_prefix is 0")
        self.dim, self.num_prefix, self.out_dim = dim, num_prefix, out_dim or dim

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(weight.numel() for weight in self.parameters() if weight.requires_grad)

    def forward(
        self, x: Tensor, *, cls_attention: Tensor | None = None, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Pool tokens ``x [B, N, D]``.

        Args:
            cls_attention: ``[B, H, N]`` the [cls] query's attention per head, as ``cls_attention`` gives it; read only
                by poolings whose ``needs_cls_attention`` is set.
            return_weights: also return the weights of the tokens.

        Returns:
            ``[B, D']``; with ``return_weights`` also ``[B, G, N]`` fp32, one row of weights per query (and head), zero
            on tokens that are not pooled.

        Raises:
            ValueError: tokens or attention do not fit; or this pooling gives no weights.
        """
        _checks.is_tensor(self.name, "tokens", x)
        if x.dim() != 3 or x.shape[2] != self.dim or x.shape[1] <= self.num_prefix:
            raise ValueError(
                f"{self.name}: tokens must be [B, N, {self.dim}] with more than {self.num_prefix} prefix tokens, "
                f"got {list(x.shape)}"
            )
        if self.needs_cls_attention:
            if cls_attention is None:
                raise ValueError(f"{self.name} needs cls_attention [B, H, N], got None")
            _checks.is_tensor(self.name, "cls_attention", cls_attention)
            if cls_attention.dim() != 3 or cls_attention.shape[::2] != x.shape[:2]:
                raise ValueError(
                    f"{self.name}: cls_attention must be [{x.shape[0]}, H, {x.shape[1]}], "
                    f"got {list(cls_attention.shape)}"
                )
        if return_weights and not self.gives_weights:
            raise ValueError(f"{self.name} does not weigh tokens: it has no weights to return")
        pooled, weights = self.pool(x, cls_attention)
        if not return_weights:
            return pooled
        assert weights is not None
        return pooled, weights

    def pool(self, x: Tensor, cls_attention: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``[B, D']`` and weights ``[B, G, N]``, or None where there are none."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.name}, {self.dim} -> {self.out_dim}, num_prefix={self.num_prefix}, {self.num_parameters} weights"

    def _patches(self, x: Tensor) -> Tensor:
        return x[:, self.num_prefix :]

    def _over_all_tokens(self, weights: Tensor) -> Tensor:
        """Weights of patches ``[B, G, N - P]`` with zeros for the prefix tokens."""
        return F.pad(weights, (self.num_prefix, 0))


class Cls(Pooling):
    name, description = "cls", "the [cls] token"
    needs_cls_token, gives_weights = True, False

    def pool(self, x: Tensor, cls_attention: Tensor | None) -> tuple[Tensor, None]:
        return x[:, 0], None


class Mean(Pooling):
    name, description = "mean", "mean of the patch tokens"
    gives_weights = False

    def pool(self, x: Tensor, cls_attention: Tensor | None) -> tuple[Tensor, None]:
        return reduce_pool(x, "mean", num_prefix=self.num_prefix), None


class Max(Pooling):
    name, description = "max", "largest value of every column over the patch tokens"
    gives_weights = False

    def pool(self, x: Tensor, cls_attention: Tensor | None) -> tuple[Tensor, None]:
        return reduce_pool(x, "max", num_prefix=self.num_prefix), None


class GeM(Pooling):
    """``(mean_n max(x_n, eps)^p)^(1/p)`` with one trained exponent (arXiv:1711.02512)."""

    name, description = "gem", "generalised mean with a trained exponent"
    gives_weights = False

    def __init__(self, dim: int, num_prefix: int, *, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__(dim, num_prefix)
        self.p, self.eps = nn.Parameter(torch.tensor([float(p)])), eps

    def pool(self, x: Tensor, cls_attention: Tensor | None) -> tuple[Tensor, None]:
        return reduce_pool(x, "gem", num_prefix=self.num_prefix, p=self.p, eps=self.eps), None


class ClsMean(Pooling):
    name, description = "cls+mean", "the [cls] token and the mean of the patch tokens, side by side"
    needs_cls_token, gives_weights = True, False

    def __init__(self, dim: int, num_prefix: int) -> None:
        super().__init__(dim, num_prefix, 2 * dim)

    def pool(self, x: Tensor, cls_attention: Tensor | None) -> tuple[Tensor, None]:
        return torch.cat((x[:, 0], reduce_pool(x, "mean", num_prefix=self.num_prefix)), dim=1), None


class AbMILP(Pooling):
    """``sum_n a_n v_n`` with ``a = softmax_n f(u_n)`` over the patches: attention-based multiple instance learning.

    f is a linear map to one score, after `depth` - 1 hidden layers. Without options u = v = x. The score's bias, which
    published heads have, cancels in the softmax and is left out.

    Args:
        depth: of f; 1 is the paper's headline.
        activation: of the hidden layers, "tanh" or "relu".
        content: "patches" or "all", which also weighs prefix tokens.
        positions: add the fixed 2-D sine-cosine positions to u; True for a square grid, or (rows, columns).
        self_attention: a layer of one head before: "map" feeds u, "both" u and v; or "none".

    Source: arXiv:1802.04712; arXiv:2412.03215 and its code.
    """

    name, description = "abmilp", "one trained score per patch, softmax, weighted sum"

    def __init__(
        self,
        dim: int,
        num_prefix: int,
        *,
        depth: int = 1,
        activation: str = "tanh",
        content: str = "patches",
        positions: bool | Sequence[int] = False,
        self_attention: str = "none",
    ) -> None:
        super().__init__(dim, num_prefix)
        _one_of(self, "activation", activation, ("tanh", "relu"))
        _one_of(self, "content", content, ("patches", "all"))
        _one_of(self, "self_attention", self_attention, ("none", "map", "both"))
        if depth < 1:
            raise ValueError(f"abmilp: depth must be at least 1, got {depth}")
        self.first = num_prefix if content == "patches" else 0
        self.positions, self.self_attention = positions, self_attention
        self.self_attn = _SelfAttention(dim) if self_attention != "none" else None
        act = nn.Tanh if activation == "tanh" else nn.ReLU
        self.hidden = nn.Sequential(*(part for _ in range(depth - 1) for part in (nn.Linear(dim, dim), act())))
        self.score = nn.Linear(dim, 1, bias=False)

    def pool(self, x: Tensor, cls_attention: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x[:, self.first :]
        seen = x if self.self_attn is None else self.self_attn(x)
        values = seen if self.self_attention == "both" else x
        if self.positions is not False:
            seen = seen + self._positions(x)
        pooled, weights = query_pool(
            self.hidden(seen), self.score.weight, values=values.to(seen.dtype), scale=1.0, return_weights=True
        )
        return pooled.squeeze(1), F.pad(weights, (self.first, 0))

    def _positions(self, x: Tensor) -> Tensor:
        prefix = self.num_prefix - self.first
        patches = x.shape[1] - prefix
        side = math.isqrt(patches)
        assert self.positions is not False
        rows, columns = (side, side) if self.positions is True else self.positions
        if rows * columns != patches:
            raise ValueError(f"abmilp: positions for a grid of {rows} x {columns}, but there are {patches} patches")
        return sincos_positions_2d(self.dim, (rows, columns), prefix).to(x)


class _SelfAttention(nn.Module):
    """Self-attention of one head, with the parameters of timm's ``Attention(dim, num_heads=1)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=2)  # [B, N, D] each
        out: Tensor = self.proj(attention(q[:, None], k[:, None], v[:, None]).out.squeeze(1))
        return out


class _ByClsAttention(Pooling):
    needs_cls_token, needs_cls_attention = True, True

    def pool(self, x: Tensor, cls_attention: Tensor | None) -> tuple[Tensor, Tensor]:
        assert cls_attention is not None
        mass = self.choose(cls_attention[:, :, self.num_prefix :].float())  # [B, N - P]
        weights = mass / mass.sum(1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
        weights = self._over_all_tokens(weights[:, None])
        return weighted_pool(x, weights.squeeze(1), normalize=False, num_prefix=self.num_prefix), weights

    def choose(self, mass: Tensor) -> Tensor:
        """``[B, N - P]`` from the patches' attention ``[B, H, N - P]``."""
        raise NotImplementedError


class AttentionMean(_ByClsAttention):
    name, description = "attn-mn", "patches weighted by the last block's [cls] attention, mean over heads"

    def choose(self, mass: Tensor) -> Tensor:
        return mass.mean(1)


class AttentionLowestEntropy(_ByClsAttention):
    """The head whose [cls] attention over the patches has the least entropy, chosen for every image.

    Source: arXiv:2412.03215 and its code, whose 1e-6 is kept in the entropy.
    """

    name, description = "attn-lcte", "patches weighted by the [cls] attention of the head with the least entropy"

    def choose(self, mass: Tensor) -> Tensor:
        share = mass / (mass.sum(2, keepdim=True) + 1e-6)
        entropy = -(share * (share + 1e-6).log()).sum(2)  # [B, H]
        return mass[torch.arange(mass.shape[0], device=mass.device), entropy.argmin(1)]


class TopK(Pooling):
    """The mean of the k patches with the highest score.

    Args:
        k: how many; a share of the patches if below 1.
        by: "cls_attention" (mean over heads) or "norm" of the token.
    """

    name, description = "topk", "mean of the patches with the most [cls] attention"

    def __init__(self, dim: int, num_prefix: int, *, k: float = 0.25, by: str = "cls_attention") -> None:
        super().__init__(dim, num_prefix)
        _one_of(self, "by", by, ("cls_attention", "norm"))
        if not k > 0:
            raise ValueError(f"topk: k must be a positive number of patches or share of them, got {k}")
        self.k, self.needs_cls_attention = k, by == "cls_attention"
        if self.needs_cls_attention and num_prefix < 1:
            raise ValueError("topk by cls_attention needs a [cls] token, but num_prefix is 0")

    def pool(self, x: Tensor, cls_attention: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.needs_cls_attention:
            assert cls_attention is not None
            scores = cls_attention.mean(1)  # [B, N]
        else:
            scores = x.float().norm(dim=2)
        patches = x.shape[1] - self.num_prefix
        count = max(1, round(self.k * patches)) if self.k < 1 else int(self.k)
        if count > patches:
            raise ValueError(f"topk: k = {count}, but there are {patches} patches")
        chosen = scores[:, self.num_prefix :].topk(count, dim=1).indices + self.num_prefix
        weights = torch.zeros(x.shape[:2], device=x.device).scatter(1, chosen, 1 / count)
        return weighted_pool(x, weights, normalize=False, num_prefix=self.num_prefix), weights[:, None]


class EfficientProbing(Pooling):
    """M queries, each of which pools its own slice of the projected tokens: ``concat_m W_v^m sum_n a_mn x_n``.

    Args:
        num_queries: M; divides `out_dim`. By default 32, or the next fewer that divides `out_dim`.
        out_dim: width of the result; D by default.

    Source: arXiv:2506.10178 and its code.
    """

    name, description = "ep", "efficient probing: several trained queries, each for a slice of the projected tokens"

    def __init__(
        self, dim: int, num_prefix: int, *, num_queries: int | None = None, out_dim: int | None = None
    ) -> None:
        super().__init__(dim, num_prefix, out_dim)
        if num_queries is None:
            num_queries = next(count for count in range(32, 0, -1) if self.out_dim % count == 0)
        if num_queries < 1 or self.out_dim % num_queries:
            raise ValueError(f"ep: num_queries must divide the {self.out_dim} columns of the result, got {num_queries}")
        self.queries = nn.Parameter(0.02 * torch.randn(num_queries, dim))
        self.value = nn.Linear(dim, self.out_dim, bias=False)

    def pool(self, x: Tensor, cls_attention: Tensor | None) -> tuple[Tensor, Tensor]:
        pooled, weights = query_pool(x, self.queries, num_prefix=self.num_prefix, return_weights=True)  # [B, M, D]
        slices = self.value.weight.unflatten(0, (len(self.queries), -1))  # [M, D' / M, D]
        return torch.einsum("bmd,mcd->bmc", pooled, slices).flatten(1), weights


def _multi_head(
    x: Tensor, queries: Tensor, key: Tensor, value: Tensor, value_bias: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Cross-attention of L queries ``[L, E]``, the same for every image, to tokens ``x [B, N, D]``.

    key, value: weights ``[E, D]`` of the projections. The keys' bias adds one number to all scores of a query, which
    cancels in the softmax. Returns ``[B, L, E]`` and the weights ``[B, L * H, N]``.
    """
    key, value = key.unflatten(0, (num_heads, -1)), value.unflatten(0, (num_heads, -1))  # [H, E / H, D]
    per_head = torch.einsum("lhe,hed->lhd", queries.unflatten(1, (num_heads, -1)), key)
    pooled, weights = query_pool(x, per_head.flatten(0, 1), scale=key.shape[1] ** -0.5, return_weights=True)
    out = torch.einsum("blhd,hed->blhe", pooled.unflatten(1, (-1, num_heads)), value).flatten(2)
    return (out if value_bias is None else out + value_bias), weights


class MAP(Pooling):
    """timm's ``AttentionPoolLatent``: learned queries, projected keys and values, projection, MLP.

    Parameters have timm's names and shapes, so that its state dicts load; results are equal.

    Args:
        num_heads: divides D.
        mlp_ratio: hidden width of the MLP over D.
        latent_len: number of learned queries.
        pool_type: "token" takes the first query's result, "avg" the mean of all.
        norm: a LayerNorm in front of the MLP, as timm has with ``norm_layer=nn.LayerNorm``; `norm_eps` is its eps.

    Source: Set Transformer (arXiv:1810.00825), as in SigLIP and timm.
    """

    name, description = "map", "learned query, multi-head cross-attention, MLP; timm's AttentionPoolLatent"

    def __init__(
        self,
        dim: int,
        num_prefix: int,
        *,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        latent_len: int = 1,
        pool_type: str = "token",
        norm: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(dim, num_prefix)
        _divides(self, num_heads)
        _one_of(self, "pool_type", pool_type, ("token", "avg"))
        self.num_heads, self.pool_type = num_heads, pool_type
        self.latent = nn.Parameter(torch.empty(1, latent_len, dim))
        nn.init.trunc_normal_(self.latent, std=dim**-0.5)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps) if norm else nn.Identity()
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def pool(self, x: Tensor, cls_attention: Tensor | None) -> tuple[Tensor, Tensor]:
        key, value = self.kv.weight.chunk(2)
        queries = self.q(self.latent[0])
        y, weights = _multi_head(self._patches(x), queries, key, value, self.kv.bias[self.dim :], self.num_heads)
        y = self.proj(y)  # [B, L, D]
        y = y + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm(y))))
        return y[:, 0] if self.pool_type == "token" else y.mean(1), self._over_all_tokens(weights)


class AIM(Pooling):
    """Learned queries over batch-normalised tokens, multi-head; the mean over queries (the probe of AIM).

    Args:
        num_heads: divides D.
        num_queries: whose results are averaged.

    Source: arXiv:2401.08541 and its code.
    """

    name, description = "aim", "learned query over batch-normalised tokens, multi-head; the probe of AIM"

    def __init__(self, dim: int, num_prefix: int, *, num_heads: int = 12, num_queries: int = 1) -> None:
        super().__init__(dim, num_prefix)
        _divides(self, num_heads)
        self.num_heads = num_heads
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.queries = nn.Parameter(0.02 * torch.randn(num_queries, dim))
        self.k, self.v = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def pool(self, x: Tensor, cls_attention: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self._patches(x)
        x = self.norm(x.flatten(0, 1)).view(x.shape)
        y, weights = _multi_head(x, self.queries, self.k.weight, self.v.weight, None, self.num_heads)
        return y.mean(1), self._over_all_tokens(weights)


class CAE(Pooling):
    """Learned query, layer norms before the projections of query, keys and values, output projection (CAE's probe).

    The two norms of the tokens differ in gain and bias only, which move into the projections behind them.

    Args:
        num_heads: divides D.

    Source: arXiv:2202.03026 and its code.
    """

    name, description = "cae", "learned query, layer norms, multi-head cross-attention; the probe of CAE"

    def __init__(self, dim: int, num_prefix: int, *, num_heads: int = 8) -> None:
        super().__init__(dim, num_prefix)
        _divides(self, num_heads)
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(1, dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def pool(self, x: Tensor, cls_attention: Tensor | None) -> tuple[Tensor, Tensor]:
        x = F.layer_norm(self._patches(x), (self.dim,), eps=self.norm_k.eps)
        y, weights = _multi_head(
            x,
            self.q(self.norm_q(self.query)),
            self.k.weight * self.norm_k.weight,  # the bias of norm_k cancels, as any bias of keys
            self.v.weight * self.norm_v.weight,
            self.v(self.norm_v.bias),
            self.num_heads,
        )
        return self.proj(y).squeeze(1), self._over_all_tokens(weights)


class SimPool(Pooling):
    """The mean token asks: query ``W_q mean(x)``, keys ``W_k LN(x)``, values ``LN(x)``.

    Parameters have the names of timm's ``SimPool1d``, whose state dicts load; results are equal.

    Args:
        num_heads: divides D.
        gamma: pool the values' gamma-th powers, above each column's minimum, and take the root; None for plain values.
        norm_eps: of the LayerNorm.

    Source: arXiv:2309.06891; timm takes the minimum per image and column, the authors' code over the whole batch.
    """

    name, description = "simpool", "the mean token as query of a cross-attention over the normalised tokens"

    def __init__(
        self, dim: int, num_prefix: int, *, num_heads: int = 1, gamma: float | None = None, norm_eps: float = 1e-6
    ) -> None:
        super().__init__(dim, num_prefix)
        _divides(self, num_heads)
        self.num_heads, self.gamma = num_heads, gamma
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.q, self.k = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def pool(self, x: Tensor, cls_attention: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self._patches(x)
        queries = self.q(reduce_pool(x, "mean")).unflatten(1, (self.num_heads, -1))  # [B, H, D / H]
        key = self.k.weight.unflatten(0, (self.num_heads, -1))  # [H, D / H, D]
        queries = torch.einsum("bhe,hed->bhd", queries, key)
        x = self.norm(x)
        values = None if self.gamma is None else (x - x.amin(1, keepdim=True) + 1e-6).pow(self.gamma)
        scale = key.shape[1] ** -0.5
        pooled, weights = query_pool(x, queries, values=values, sliced=True, scale=scale, return_weights=True)
        pooled = pooled.flatten(1)
        return pooled if self.gamma is None else pooled.pow(1 / self.gamma), self._over_all_tokens(weights)


_POOLINGS: dict[str, type[Pooling]] = {
    kind.name: kind
    for kind in (
        Cls,
        Mean,
        Max,
        GeM,
        ClsMean,
        AbMILP,
        AttentionMean,
        AttentionLowestEntropy,
        TopK,
        EfficientProbing,
        MAP,
        AIM,
        CAE,
        SimPool,
    )
}


def poolings() -> dict[str, str]:
    """Every pooling's name and what it does."""
    return {name: kind.description for name, kind in _POOLINGS.items()}


_POSITIVE = ("p", "gamma", "eps", "norm_eps", "mlp_ratio", "latent_len")  # options


def build_pooling(name: str, dim: int, num_prefix: int, **options: Any) -> Pooling:
    """A new pooling module.

    Args:
        name: as in ``poolings()``.
        dim: width D of the tokens.
        num_prefix: leading tokens ([cls] first) that are no patches.
        options: of the pooling's class, such as ``depth=2`` for "abmilp" or ``num_queries=16`` for "ep".

    Raises:
        ValueError: an unknown name or option (lists the known ones), or a value that does not fit.
    """
    if not isinstance(name, str):
        raise TypeError(f"a pooling is named by a str, got {type(name).__name__}; known: {', '.join(_POOLINGS)}")
    if name not in _POOLINGS:
        close = difflib.get_close_matches(name, _POOLINGS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown pooling {name!r}; known: {', '.join(_POOLINGS)}{hint}")
    kind = _POOLINGS[name]
    parameters = inspect.signature(kind.__init__).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise ValueError(f"pooling {name!r} has no option {option!r}; it has {', '.join(known) or 'none'}")
    annotations = typing.get_type_hints(kind.__init__)
    for option, value in options.items():
        _check_type(name, option, value, annotations[option])
    return kind(dim, num_prefix, **options)


def cls_attention(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """The [cls] query's attention ``[B, H, N]`` fp32, for poolings that need it; N x N is never computed.

    Args:
        q, k: ``[B, H, N, D]`` of the last block, as ``record_heads`` keeps them.
        options: of ``attention_rows``; the ``options`` of a recorded layer.

    Example::

        with record_heads(encoder.blocks[-1], keep=("q", "k")) as heads:
            tokens = encoder.forward_features(images)
        pooled = pooling(tokens, cls_attention=cls_attention(heads[0].q, heads[0].k, **heads[0].options))
    """
    return attention_rows(q, k, [0], **options).squeeze(2)


def _check_type(pooling: str, option: str, value: Any, annotation: Any) -> None:
    """Refuse a value of another type than the option's annotation, where an int is a float."""
    kinds = [typing.get_origin(kind) or kind for kind in typing.get_args(annotation) or (annotation,)]
    fits = isinstance(value, (*kinds, int) if float in kinds else tuple(kinds))
    for special in (bool, str):  # also an int, also a sequence
        fits = fits and (special in kinds or not isinstance(value, special))
    if not fits:
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"pooling {pooling!r}: {option} must be {wanted}, got {value!r}")
    if isinstance(value, int | float) and not abs(value) < 1e300:
        raise ValueError(f"pooling {pooling!r}: {option} must be finite, got {value!r}")
    if option in _POSITIVE and value is not None and not value > 0:
        raise ValueError(f"pooling {pooling!r}: {option} must be positive, got {value!r}")


def _one_of(pooling: Pooling, option: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{pooling.name}: {option} must be one of {', '.join(known)}, got {value!r}")


def _divides(pooling: Pooling, num_heads: int) -> None:
    if num_heads < 1 or pooling.dim % num_heads:
        raise ValueError(f"{pooling.name}: num_heads must divide the {pooling.dim} columns of a token, got {num_heads}")
