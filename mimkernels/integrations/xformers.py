"""xformers' operators that Vision Transformers use, by name and signature, on the ops of mimkernels.

DINOv2's code, and what descends from it, runs with one import changed, on CPU too, and without xformers::

    from mimkernels.integrations.xformers import fmha, index_select_cat, memory_efficient_attention, scaled_index_add
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mimkernels.nn.sdpa import has_own_rules
from mimkernels.nn.sdpa.stand_in import scaled_dot_product_attention
from mimkernels.nn.sdpa.translate import autocasts

__all__ = [
    "BlockDiagonalMask",
    "LowerTriangularMask",
    "fmha",
    "index_select_cat",
    "memory_efficient_attention",
    "scaled_index_add",
    "unbind",
]


class LowerTriangularMask:
    """Causal attention: query i attends to keys 0 to i."""

    def __init__(self, device: torch.device | None = None) -> None:
        """`device` is not needed."""

    def materialize(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The bias that this mask stands for, ``[..., queries, keys]``: 0 up to the diagonal, else -inf."""
        return torch.full(shape, float("-inf"), dtype=dtype, device=device).triu(1)


class BlockDiagonalMask:
    """Sequences of several lengths packed along one dimension, each attending to itself only.

    Example::

        mask, packed = BlockDiagonalMask.from_tensor_list([crops_a, crops_b])  # [B, M, ...] each
        out = memory_efficient_attention(q, k, v, attn_bias=mask)             # of [1, total, H, K]
        out_a, out_b = mask.split(out)
    """

    def __init__(self, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None) -> None:
        self.q_seqlen = _as_lengths(q_seqlen)
        self.kv_seqlen = self.q_seqlen if kv_seqlen is None else _as_lengths(kv_seqlen)
        if len(self.q_seqlen) != len(self.kv_seqlen):
            raise ValueError(
                f"BlockDiagonalMask: {len(self.q_seqlen)} lengths of queries but {len(self.kv_seqlen)} of keys"
            )
        if any(length < 0 for length in (*self.q_seqlen, *self.kv_seqlen)):
            raise ValueError(f"BlockDiagonalMask: lengths must not be negative, got {self.q_seqlen}, {self.kv_seqlen}")
        # How many sequences make up each tensor that `split` gives; code written for xformers sets it by this name.
        self._batch_sizes: Sequence[int] | None = None
        self._lengths_of_none: dict[int, int] = {}  # of tensors that no sequence makes up, by their number

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int] | None = None,
        *,
        device: torch.device | None = None,
    ) -> BlockDiagonalMask:
        """The mask of sequences with these lengths, in the order in which they are packed; `device` is not needed."""
        return cls(q_seqlen, kv_seqlen)

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[BlockDiagonalMask, Tensor]:
        """The mask of ``[B_i, M_i, ...]`` tensors, and the tensors packed to ``[1, sum of B_i * M_i, ...]``."""
        mask, packed, _, _ = cls.from_tensor_lists_qkv(tensors, tensors)
        return mask, packed

    @classmethod
    def from_tensor_lists_qkv(
        cls, tensors_q: Sequence[Tensor], tensors_k: Sequence[Tensor], tensors_v: Sequence[Tensor] | None = None
    ) -> tuple[BlockDiagonalMask, Tensor, Tensor, Tensor | None]:
        """The mask of queries ``[B_i, Mq_i, ...]`` and keys ``[B_i, Mk_i, ...]``, and all tensors packed.

        Args:
            tensors_q: ``[B_i, Mq_i, ...]`` each.
            tensors_k, tensors_v: ``[B_i, Mk_i, ...]`` each, as many.

        Returns:
            the mask; queries ``[1, sum of B_i * Mq_i, ...]``, keys and values ``[1, sum of B_i * Mk_i, ...]``, or None
            for values that were not given.

        Raises:
            ValueError: the lists differ in length, or in batches or lengths of a tensor; shows both.
        """
        for name, tensors, others, dims in (("k", tensors_k, tensors_q, 1), ("v", tensors_v, tensors_k, 2)):
            sizes, wanted = ([list(x.shape[:dims]) for x in several] for several in (tensors or (), others))
            if tensors is not None and sizes != wanted:
                raise ValueError(
                    f"BlockDiagonalMask: tensors_{name} have the sizes {sizes}..., but those they belong to {wanted}..."
                )
        mask = cls(*([x.shape[1] for x in tensors for _ in range(x.shape[0])] for tensors in (tensors_q, tensors_k)))
        mask._batch_sizes = [x.shape[0] for x in tensors_q]
        mask._lengths_of_none = {i: x.shape[1] for i, x in enumerate(tensors_q) if x.shape[0] == 0}
        return mask, _pack(tensors_q), _pack(tensors_k), None if tensors_v is None else _pack(tensors_v)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Packed ``[1, total, ...]`` as one tensor per sequence, or as those that `from_tensor_list` packed."""
        if tensor.shape[0] != 1 or tensor.shape[1] != sum(self.q_seqlen):
            raise ValueError(
                f"BlockDiagonalMask.split: the tensor {list(tensor.shape)} must be [1, {sum(self.q_seqlen)}, ...]"
            )
        if self._batch_sizes is None:
            return list(tensor.split(self.q_seqlen, dim=1))
        parts, first, start = [], 0, 0
        for number, count in enumerate(self._batch_sizes):
            lengths = self.q_seqlen[first : first + count]
            if len(set(lengths)) > 1:
                raise ValueError(f"BlockDiagonalMask.split: sequences of lengths {lengths} are no batch")
            part = tensor[0, start : start + sum(lengths)]
            length = lengths[0] if lengths else self._lengths_of_none.get(number, 0)
            parts.append(part.reshape(count, length, *tensor.shape[2:]))
            first, start = first + count, start + sum(lengths)
        return parts

    def materialize(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The bias that this mask stands for, ``[..., total queries, total keys]``: 0 within a sequence, else -inf."""
        queries, keys = (torch.tensor(lengths, device="cpu") for lengths in (self.q_seqlen, self.kv_seqlen))
        of_query, of_key = (torch.arange(len(n), device="cpu").repeat_interleave(n) for n in (queries, keys))
        bias = torch.zeros(len(of_query), len(of_key), dtype=dtype, device="cpu")
        bias.masked_fill_(of_query[:, None] != of_key, float("-inf"))
        return bias.to(device).expand(*shape)


def _as_lengths(lengths: Sequence[int]) -> list[int]:
    """Lengths of sequences; integers of any kind, and what has one, such as a tensor of one element."""
    if not isinstance(lengths, Iterable):
        raise TypeError(f"BlockDiagonalMask: lengths must be a sequence of integers, got {type(lengths).__name__}")
    try:
        return [operator.index(length) for length in lengths]
    except TypeError:
        raise TypeError(f"BlockDiagonalMask: lengths must be a sequence of integers, got {lengths!r:.60}") from None


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | BlockDiagonalMask | LowerTriangularMask | Any | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Exact attention of ``[B, M, H, K]`` tensors (or ``[B, M, K]``: one head); gradients as usual.

    What ``mimkernels.attention`` does not take, such as dropout or a value wider than the key, goes to
    ``F.scaled_dot_product_attention``.

    Args:
        query: ``[B, Mq, H, K]``; any strides, such as views of a packed projection.
        key, value: ``[B, Mk, H, K]``.
        attn_bias: added to the scores, ``[B, H, Mq, Mk]`` or anything that broadcasts to it; a ``BlockDiagonalMask``
            for packed sequences (B = 1), which then run in batches of equal length; another of xformers' biases, which
            is written out as a tensor; or torch's ``CausalBias``.
        p: dropout of the attention weights.
        scale: of the scores; ``K ** -0.5`` if None.
        op: None; xformers' choice of a kernel has no meaning here.
        output_dtype: of the result; that of `query` if None.

    Returns:
        ``[B, Mq, H, K]``, contiguous.

    Raises:
        ValueError: shapes disagree with each other or with the mask.
        NotImplementedError: an `op` is given, or 5 dimensions (grouped queries).

    Source: the interface of ``xformers.ops.memory_efficient_attention``.
    """
    if op is not None:
        raise NotImplementedError(f"memory_efficient_attention: op must be None, got {op}; see mimkernels.use_backend")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"memory_efficient_attention: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if not query.dim() == key.dim() == value.dim():
        raise ValueError(f"memory_efficient_attention: dimensions differ: {shapes}")
    if query.dim() > 1 and (key.shape[1] != value.shape[1] or query.shape[-1] != key.shape[-1]):
        raise ValueError(
            f"memory_efficient_attention: keys must be as many as values, and as wide as queries: {shapes}"
        )
    if not query.dtype == key.dtype == value.dtype and not autocasts(query.device.type):
        raise ValueError(
            f"memory_efficient_attention: dtypes differ: query {query.dtype}, key {key.dtype}, value {value.dtype}"
        )
    if not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise ValueError(f"memory_efficient_attention: p must be a probability, from 0 to 1, got {p!r}")
    if query.dim() == 3:
        q, k, v = query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2)
        if isinstance(attn_bias, Tensor) and not has_own_rules(attn_bias) and attn_bias.dim() == 3:
            attn_bias = attn_bias.unsqueeze(1)
        out = memory_efficient_attention(q, k, v, attn_bias, p, scale, output_dtype=output_dtype)
        return out.squeeze(2)
    if query.dim() != 4:
        raise NotImplementedError(
            f"memory_efficient_attention: query must be [B, M, H, K] or [B, M, K], got {list(query.shape)}"
        )
    lengths = _lengths(attn_bias)
    if lengths is not None:
        out = _packed(query, key, value, *lengths, p, scale)
    else:
        causal = isinstance(attn_bias, LowerTriangularMask) or _is_of_xformers(attn_bias, "LowerTriangularMask")
        bias = None if causal else _as_tensor(attn_bias, query, key)
        out = _attention(query, key, value, bias, p, scale, causal)
    return out if output_dtype is None else out.to(output_dtype)


def unbind(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """``torch.unbind``: the kernels take and give strided q, k and v, so that nothing is gained by more."""
    return torch.unbind(x, dim)


def index_select_cat(sources: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """``cat([s[i].flatten() for s, i in zip(sources, indices)])``.

    Args:
        sources: ``[S_i, D_i]`` each.
        indices: ``[I_i]`` each, unique within one source, in ``[0, S_i)``.

    Returns:
        ``[sum of I_i * D_i]``.
    """
    picked = [source.index_select(0, index.long()) for source, index in zip(sources, indices, strict=True)]
    return torch.cat([rows.flatten() for rows in picked])


def scaled_index_add(
    input: Tensor, index: Tensor, source: Tensor, scaling: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    """``input[index] += alpha * scaling * source``, in place, and `input` itself.

    Args:
        input: ``[B, M, D]``, changed in place.
        index: ``[Bi]``, unique, in ``[0, B)``; all of them is allowed.
        source: ``[Bi, M, D]``.
        scaling: ``[D]``, or None for 1.
        alpha: factor of all.
    """
    factor = alpha
    if scaling is not None:
        # Products in fp32, so that they and the gradients of 16-bit tensors are rounded once.
        precise = torch.promote_types(torch.promote_types(source.dtype, scaling.dtype), torch.float32)
        source, factor = source.to(precise) * (scaling.to(precise) * alpha), 1.0
    return input.index_add_(0, index.long(), source.to(input.dtype), alpha=factor)


fmha = SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask, memory_efficient_attention=memory_efficient_attention)


def _lengths(bias: Any) -> tuple[list[int], list[int]] | None:
    """Lengths of queries and keys of a block-diagonal mask, ours or xformers', which need not be installed."""
    if isinstance(bias, BlockDiagonalMask):
        return bias.q_seqlen, bias.kv_seqlen
    if _is_of_xformers(bias, "BlockDiagonalMask"):
        starts = bias.q_seqinfo.seqstart_py, bias.k_seqinfo.seqstart_py
        q, k = ([end - start for start, end in pairwise(s)] for s in starts)
        return q, k
    return None


def _is_of_xformers(bias: object, name: str) -> bool:
    """Whether it is of exactly that class: those derived from it (causal, local, with a bias) mean something else."""
    return type(bias).__name__ == name and type(bias).__module__.startswith("xformers.")


def _as_tensor(bias: Any, query: Tensor, key: Tensor) -> Tensor | None:
    if bias is None or (isinstance(bias, Tensor) and not hasattr(bias, "materialize")):
        return bias
    if not hasattr(bias, "materialize"):
        raise TypeError(f"memory_efficient_attention: attn_bias must be a tensor or a mask, got {type(bias).__name__}")
    shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    return bias.materialize(shape, dtype=query.dtype, device=query.device)


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, p: float, scale: float | None, causal: bool):
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = scaled_dot_product_attention(q, k, v, bias, dropout_p=p, is_causal=causal, scale=scale)
    return out.transpose(1, 2).contiguous()  # [B, M, H, K]: how the kernels write it


def _packed(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: list[int], k_lengths: list[int], p: float, scale: float | None
) -> Tensor:
    """Each sequence by itself, those of equal lengths as one batch."""
    for name, tensor, lengths in (("query", q, q_lengths), ("key", k, k_lengths), ("value", v, k_lengths)):
        if tensor.shape[0] != 1 or tensor.shape[1] != sum(lengths):
            raise ValueError(
                f"memory_efficient_attention: {name} {list(tensor.shape)} must be [1, {sum(lengths)}, H, K] for a "
                f"block-diagonal mask of {len(lengths)} sequences"
            )
    groups: dict[tuple[int, int], list[int]] = {}
    for number, sizes in enumerate(zip(q_lengths, k_lengths, strict=True)):
        if sizes[0]:
            groups.setdefault(sizes, []).append(number)
    q_starts, k_starts = _starts(q_lengths), _starts(k_lengths)
    pieces: dict[int, Tensor] = {}  # by the first sequence that they hold
    for (q_length, k_length), numbers in groups.items():
        out = _attention(
            _batch(q, numbers, q_starts, q_length),
            _batch(k, numbers, k_starts, k_length),
            _batch(v, numbers, k_starts, k_length),
            None,
            p,
            scale,
            False,
        )
        if _side_by_side(numbers):
            pieces[numbers[0]] = out.flatten(0, 1)
        else:
            pieces.update(zip(numbers, out.unbind(0), strict=True))
    if not pieces:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    return torch.cat([pieces[number] for number in sorted(pieces)]).unsqueeze(0)


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:]) for x in tensors], dim=1)


def _starts(lengths: list[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def _side_by_side(numbers: list[int]) -> bool:
    return numbers[-1] - numbers[0] + 1 == len(numbers)


def _batch(x: Tensor, numbers: list[int], starts: list[int], length: int) -> Tensor:
    """Sequences of one length from ``[1, total, H, K]`` as ``[b, length, H, K]``; side by side: a view."""
    if _side_by_side(numbers):
        start = starts[numbers[0]]
        return x[0, start : start + len(numbers) * length].reshape(len(numbers), length, *x.shape[2:])
    return torch.stack([x[0, starts[number] : starts[number] + length] for number in numbers])
