"""``F.scaled_dot_product_attention`` by ``mimkernels.attention``, and a stand-in that leaves the rest to PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from mimkernels.nn.sdpa.measured import why_torch
from mimkernels.nn.sdpa.observe import NO_STATISTICS, StatisticsRequest, attend, observers
from mimkernels.nn.sdpa.translate import (
    SDPAArguments,
    as_attention,
    autocasts,
    has_own_rules,
    is_for_pytorch,
    laid_out_as,
    refusals,
)
from mimkernels.ops import AttentionOutput, attention
from mimkernels.ops.attention.spec import SPEC

__all__ = ["kernels_refuse", "scaled_dot_product_attention", "sdpa", "stand_in"]


def sdpa(arguments: SDPAArguments, request: StatisticsRequest = NO_STATISTICS) -> AttentionOutput:
    """What ``F.scaled_dot_product_attention`` gives, in ``out``, by ``mimkernels.attention``; with statistics.

    Returns:
        ``out`` in the shape that PyTorch gives; ``lse`` and ``stats`` are ``[B, H, Nq]``, see ``as_attention``.

    Raises:
        ValueError: a call that PyTorch refuses, too, or dropout.
        NotImplementedError, TypeError: what ``refusals`` tells of; ask it first.
    """
    if arguments.dropout_p > 0:
        raise ValueError(f"attention has no dropout, got dropout_p = {arguments.dropout_p}")
    call = as_attention(arguments)
    output = attend(call, request)
    out = output.out.reshape(*call.leading, *output.out.shape[2:])
    return output._replace(out=laid_out_as(out, arguments.query))


_known: dict[tuple[str, torch.dtype, int | None], str | None] = {}  # not what was asked in forward mode


# Compiled code that looked into the table would be made anew once it is filled.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # of torch
def kernels_refuse(device: str, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """Why no kernel of attention runs on this device, with this dtype and head dim, if it is known; None if one does.

    ``use_backend`` does not count here: it is obeyed in the call. Nor do reasons that come and go, as those of
    forward-mode gradients.
    """
    if (device, dtype, head_dim) not in _known:
        if forward_ad._current_level >= 0:
            return None
        rows = [impl for impl in SPEC.impls if impl.backend in ("triton", "cuda", "cpu")]
        here = [impl for impl in rows if not impl.reasons(device, dtype, {})] or rows
        sizes = {} if head_dim is None else {"head_dim": head_dim}
        why = {impl.backend: impl.reasons(device, dtype, sizes) for impl in here}
        reasons = [f"{name}: {', '.join(said)}" for name, said in why.items()]
        _known[device, dtype, head_dim] = "; ".join(reasons) if all(why.values()) else None
    return _known[device, dtype, head_dim]


def stand_in(note: Callable[[list[str]], object] | None = None) -> Callable[..., Tensor]:
    """A function that takes the arguments of ``F.scaled_dot_product_attention`` and gives its result.

    What has rules of its own is for PyTorch: subclasses of tensors, and torch.fx's Proxy, which becomes the node that
    it always was. So is what ``torch.jit.trace`` records, and what PyTorch was measured to compute faster
    (``mimkernels.nn.sdpa.measured``).

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
        foreign = is_for_pytorch(query)
        faster = None if foreign else why_torch(query, key, value, attn_mask)
        if faster is not None:
            reasons = [faster]
        else:
            plain = not (foreign or dropout_p or is_causal or enable_gqa)
            if plain and _needs_no_translation(query, key, value, attn_mask):
                return laid_out_as(attention(query, key, value, bias=attn_mask, scale=scale).out, query)
            arguments = SDPAArguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            reasons = _head_dim_refused(query) or refusals(arguments)
            if not reasons:
                missing = kernels_refuse(query.device.type, query.dtype)
                if missing is None:
                    return sdpa(arguments).out
                reasons = [missing]
        if note is not None and not torch.compiler.is_compiling():
            note(reasons)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    return scaled_dot_product_attention


scaled_dot_product_attention = stand_in()


def _head_dim_refused(q: Tensor) -> list[str]:
    """The reason that needs no look at anything else."""
    if torch.compiler.is_compiling() or is_for_pytorch(q) or q.is_nested or q.dim() == 0:
        return []
    missing = kernels_refuse(q.device.type, torch.float32, q.shape[-1])
    return [] if missing is None else [missing]


def _needs_no_translation(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Whether `attention` takes the tensors as they are, as most models' calls: small models feel every step."""
    if torch.compiler.is_compiling() or observers() or any(map(has_own_rules, (k, v, bias))) or q.is_nested:
        return False
    sizes, of_keys, dtype, device = q.shape, k.shape, q.dtype, q.device.type
    if (
        len(sizes) != 4
        or of_keys != v.shape
        or sizes[:2] != of_keys[:2]
        or sizes[3:] != of_keys[3:]
        or k.dtype != dtype
        or v.dtype != dtype
        or autocasts(device)
        or kernels_refuse(device, dtype, sizes[3]) is not None
    ):
        return False
    return bias is None or (
        bias.dtype == dtype
        and bias.dim() == 4
        and bias.shape[2:] == (sizes[2], of_keys[2])
        and bias.shape[0] in (1, sizes[0])
        and bias.shape[1] in (1, sizes[1])
    )
