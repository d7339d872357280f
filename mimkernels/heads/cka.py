"""Centred kernel alignment between layers, over minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimkernels.nn.processes import gather_objects
from mimkernels.ops._checks import count, is_tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CKA", "gram_matrices", "unbiased_hsic"]

TOKENS = ("all", "cls", "patch")
_AT_ONCE = 2**17  # numbers of features


def unbiased_hsic(k: Tensor, l: Tensor) -> Tensor:
    """Unbiased HSIC of every pair of Gram matrices.

    ``[tr(KL) + sum(K) sum(L) / ((n-1)(n-2)) - 2 * 1^T K L 1 / (n-2)] / (n (n-3))`` with zero diagonals.

    Args:
        k: ``[A, n, n]`` symmetric; diagonals are ignored.
        l: ``[B, n, n]``.

    Returns:
        ``[A, B]`` float64.

    Raises:
        ValueError: fewer than 4 samples, or shapes that disagree.

    Source: Song et al. 2012; minibatches as in Nguyen et al. 2021, arXiv:2010.15327.
    """
    is_tensor("unbiased_hsic", "k", k)
    is_tensor("unbiased_hsic", "l", l)
    if k.dim() != 3 or l.dim() != 3 or k.shape[1:] != l.shape[1:] or k.shape[1] != k.shape[2]:
        raise ValueError(f"Gram matrices must be [A, n, n] and [B, n, n], got {list(k.shape)} and {list(l.shape)}")
    n = k.shape[1]
    if n < 4:
        raise ValueError(f"unbiased HSIC needs at least 4 images in a batch, got {n}")
    off = ~torch.eye(n, dtype=torch.bool, device=k.device)
    k, l = k.double() * off, l.double() * off
    k_rows, l_rows = k.sum(2), l.sum(2)  # [A, n], [B, n]
    trace = k.flatten(1) @ l.flatten(1).T
    sums = torch.outer(k_rows.sum(1), l_rows.sum(1)) / ((n - 1) * (n - 2))
    return (trace + sums - 2 * (k_rows @ l_rows.T) / (n - 2)) / (n * (n - 3))


def gram_matrices(
    features: Sequence[Tensor],
    *,
    tokens: str = "all",
    num_prefix: int = 1,
    rescale: bool = False,
    name: str = "features",
) -> Tensor:
    """Gram matrices of centred features, one for each layer, for ``CKA.update_grams``.

    Args:
        features: ``[B, D]`` or ``[B, N, D]`` of each layer, B at least 4.
        tokens, num_prefix, rescale: as of ``CKA``.
        name: of the features, in messages.

    Returns:
        ``[layers, B, B]`` float64.

    Raises:
        ValueError: fewer than 4 images, other shapes, layers of different images, an unknown choice of tokens, or no
            patch token.
    """
    _check_tokens(tokens, num_prefix)
    if not isinstance(features, Sequence) or isinstance(features, str) or not features:
        raise ValueError(f"{name} must be a sequence of [B, D] or [B, N, D] features, one per layer")
    grams: list[Tensor] = []
    for x in features:
        is_tensor("CKA", f"a layer of {name}", x)
        if x.dim() == 3:
            first = num_prefix if tokens == "patch" else 0
            if tokens == "patch" and x.shape[1] <= first:
                raise ValueError(f"{name} {list(x.shape)} have no patch tokens: num_prefix is {num_prefix}")
            x = x[:, :1] if tokens == "cls" else x[:, first:]
        elif x.dim() != 2:
            raise ValueError(f"features must be [B, D] or [B, N, D], got {list(x.shape)}")
        if x.shape[0] < 4:
            raise ValueError(f"CKA needs at least 4 images in a batch, got {x.shape[0]}")
        x = x.detach().flatten(1)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if grams and len(x) != len(grams[0]):
            raise ValueError(f"layers of {name} have {len(grams[0])} and {len(x)} images")
        # Unbiased HSIC does not change with the features' mean; without it, float32 products keep their digits. Parts
        # stay in the caches of a CPU, where memory for all centred features would cost more than the product.
        gram = x.new_zeros(len(x), len(x))
        for part in x.split(_AT_ONCE // len(x) + 1 if x.device.type == "cpu" else x.shape[1], dim=1):
            centred = part - part.mean(0)
            gram.addmm_(centred, centred.T)
        gram = gram.double()
        if rescale:
            plain = (x @ x.T).double()
            gram = gram / (plain.max() - plain.min())
        grams.append(gram)
    return torch.stack(grams)


def _check_tokens(tokens: str, num_prefix: int) -> None:
    if tokens not in TOKENS:
        raise ValueError(f"unknown tokens {tokens!r}; known: {', '.join(TOKENS)}")
    count("CKA", "num_prefix", num_prefix)


class CKA:
    """How alike the representations of layers are, of one model or of two, over batches.

    Each batch gives an unbiased HSIC of every pair of layers; they are averaged over batches, then
    ``CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))``. Linear kernels ``K = X X^T`` on one row of features per image.
    Sums stay on the device until the result is read.

    Args:
        tokens: which tokens of ``[B, N, D]`` features make an image's row: "all", "cls" (the first) or "patch".
        num_prefix: leading tokens that are no patches; for "patch".
        rescale: each batch's Gram matrix is scaled to the range 0 to 1 first, as vit_analysis does: batches then weigh
            alike. The default weighs them by their features' scale, as the definition says.

    Raises:
        ValueError: an unknown choice of tokens, or a negative number of prefix tokens.

    Source: Nguyen et al. 2021, arXiv:2010.15327; github.com/mwalmer-umd/vit_analysis; MAE-Lite, arXiv:2205.14443.

    Example::

        cka = CKA(tokens="patch", num_prefix=1)
        for images in loader:
            cka.update(features_of_each_layer(images))  # a list of [B, N, D]
        cka.result()  # [layers, layers]
    """

    def __init__(self, *, tokens: str = "all", num_prefix: int = 1, rescale: bool = False) -> None:
        _check_tokens(tokens, num_prefix)
        self.tokens, self.num_prefix, self.rescale = tokens, num_prefix, rescale
        self.batches = 0
        self._xy: Tensor | None = None  # [A, B] sums over batches
        self._xx: Tensor | None = None  # [A]
        self._yy: Tensor | None = None  # [B]

    def __repr__(self) -> str:
        layers = "" if self._xy is None else f", {self._xy.shape[0]} x {self._xy.shape[1]} layers"
        return f"CKA(tokens={self.tokens!r}{layers}, {self.batches} batches)"

    @torch.no_grad()
    def update(self, x: Sequence[Tensor], y: Sequence[Tensor] | None = None) -> None:
        """Add one batch.

        Args:
            x: features of each layer, ``[B, D]`` or ``[B, N, D]``, B at least 4.
            y: the same images through another model, as many layers as it has; ``x`` itself if None.

        Raises:
            ValueError: fewer than 4 images, or batches or layer counts that disagree.
        """
        k = self._grams("x", x)
        self.update_grams(k, None if y is None else self._grams("y", y))

    @torch.no_grad()
    def update_grams(self, k: Tensor, l: Tensor | None = None) -> None:
        """Add one batch by its Gram matrices, which are small enough to be kept: models then need not run together.

        Args:
            k: ``[layers, B, B]`` from ``gram_matrices``.
            l: those of the same images by another model; ``k`` itself if None.

        Raises:
            ValueError: fewer than 4 images, or batches or layer counts that disagree.
        """
        l = k if l is None else l
        if k.shape[1] != l.shape[1]:
            raise ValueError(f"x has {k.shape[1]} images and y has {l.shape[1]}; both must be of the same images")
        sums = (
            unbiased_hsic(k, l),
            torch.stack([unbiased_hsic(m[None], m[None])[0, 0] for m in k]),
            torch.stack([unbiased_hsic(m[None], m[None])[0, 0] for m in l]),
        )
        if self._xy is not None:
            if self._xy.shape != sums[0].shape:
                raise ValueError(
                    f"earlier batches had {list(self._xy.shape)} layers (x, y), this one has {list(sums[0].shape)}"
                )
            assert self._xx is not None and self._yy is not None
            sums = (self._xy + sums[0], self._xx + sums[1], self._yy + sums[2])
        self._xy, self._xx, self._yy = sums
        self.batches += 1

    def _grams(self, name: str, features: Sequence[Tensor]) -> Tensor:
        return gram_matrices(features, tokens=self.tokens, num_prefix=self.num_prefix, rescale=self.rescale, name=name)

    def merge(self, other: CKA) -> CKA:
        """Add what ``other`` recorded; returns this object.

        Raises:
            ValueError: other settings or layer counts.
        """
        mine, theirs = ((c.tokens, c.num_prefix, c.rescale) for c in (self, other))
        if mine != theirs:
            raise ValueError(f"these CKAs were set up differently: {mine} and {theirs}")
        if other._xy is None:
            return self
        assert other._xx is not None and other._yy is not None
        if self._xy is None:
            self._xy, self._xx, self._yy = other._xy.clone(), other._xx.clone(), other._yy.clone()
        else:
            if self._xy.shape != other._xy.shape:
                raise ValueError(f"{list(self._xy.shape)} layers (x, y) here and {list(other._xy.shape)} there")
            assert self._xx is not None and self._yy is not None
            device = self._xy.device
            self._xy = self._xy + other._xy.to(device)
            self._xx = self._xx + other._xx.to(device)
            self._yy = self._yy + other._yy.to(device)
        self.batches += other.batches
        return self

    def reduce(self, group: ProcessGroup | None = None) -> CKA:
        """The CKA over all processes of ``torch.distributed``, as a new object; every process must call it."""
        total, here = (CKA(tokens=self.tokens, num_prefix=self.num_prefix, rescale=self.rescale) for _ in range(2))
        here.merge(self)
        if here._xy is not None:
            assert here._xx is not None and here._yy is not None
            here._xy, here._xx, here._yy = here._xy.cpu(), here._xx.cpu(), here._yy.cpu()
        # A few hundred numbers, once per evaluation: gathering whole objects also serves processes that saw nothing.
        for part in gather_objects(here, group):
            total.merge(part)
        return total

    def result(self) -> Tensor:
        """``[A, B]`` float64 on the CPU: CKA of layer a of x and layer b of y, 1 for the same up to rotation and scale.

        Raises:
            ValueError: no batch was added.
        """
        if self._xy is None:
            raise ValueError("no batch was added to this CKA")
        assert self._xx is not None and self._yy is not None
        # The number of batches cancels. A layer that is the same for all images gives 0 / 0 = NaN.
        return (self._xy / torch.outer(self._xx, self._yy).sqrt()).cpu()
