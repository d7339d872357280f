"""A stand-in for ``F.scaled_dot_product_attention``: mimkernels where its kernels take the call, PyTorch elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function

from mimkernels.nn.sdpa import AttentionCall, attend, refusals, sdpa
from mimkernels.ops.attention.spec import SPEC

__all__ = ["kernels_refuse", "scaled_dot_product_attention", "stand_in"]


_known: dict[tuple, str | None] = {}  # functools.cache would be seen through, and warned of, by torch.compile


def kernels_refuse(device: str, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """Why no kernel of attention runs on this device, with this dtype and head dim, if it is known; None if one does.

    ``use_backend`` does not count here: it is obeyed in the call.
    """
    if (device, dtype, head_dim) not in _known:
        sizes = {} if head_dim is None else {"head_dim": head_dim}
        rows = [impl for impl in SPEC.impls if impl.backend in ("triton", "cuda", "cpu")]
        why = {impl.backend: impl.reasons(device, dtype, sizes) for impl in rows}
        reasons = [f"{name}: {', '.join(said)}" for name, said in why.items()]
        _known[device, dtype, head_dim] = "; ".join(reasons) if all(why.values()) else None
    return _known[device, dtype, head_dim]


def stand_in(note: Callable[[list[str]], object] | None = None) -> Callable[..., Tensor]:
    """A function that takes the arguments of ``F.scaled_dot_product_attention`` and gives its result.

    Args:
        note: called with the reasons whenever a call goes to PyTorch; not while compiling.
    """

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if not isinstance(query, Tensor):  # of torch.fx: one node
            return handle_torch_function(scaled_dot_product_attention, (query, key, value), *arguments)
        if not (torch.compiler.is_compiling() or dropout_p or is_causal or enable_gqa):
            call = _as_it_is(query, key, value, attn_mask, scale)
            if call is not None:
                return attend(call).out
        why = refusals(*arguments)
        if not why:
            missing = kernels_refuse(query.device.type, query.dtype)
            if missing is None:
                return sdpa(*arguments).out
            why = [missing]
        if note is not None and not torch.compiler.is_compiling():
            note(why)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    return scaled_dot_product_attention


scaled_dot_product_attention = stand_in()


def _as_it_is(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> AttentionCall | None:
    """The call, if it needs no translation: what most models make, told in few steps, for small ones feel each."""
    (batch, heads, queries, dim), (keys_batch, keys_heads, keys, keys_dim) = _sizes(q), _sizes(k)
    dtype, device = q.dtype, q.device.type
    if (
        batch < 0
        or keys_batch != batch
        or keys_heads != heads
        or keys_dim != dim
        or k.shape != v.shape
        or k.dtype != dtype
        or v.dtype != dtype
        or torch.is_autocast_enabled(device)
        or kernels_refuse(device, dtype, dim) is not None
    ):
        return None
    if bias is not None:
        bias_batch, bias_heads, rows, columns = _sizes(bias)
        fits = rows == queries and columns == keys and bias_batch in (1, batch) and bias_heads in (1, heads)
        if not fits or bias.dtype != dtype:
            return None
    return AttentionCall(q, k, v, bias, None, dim**-0.5 if scale is None else scale, (batch, heads))


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape) if tensor.dim() == 4 and not tensor.is_nested else (-1, -1, -1, -1)
