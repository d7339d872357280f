"""Which axis of a call of attention is heads, where a layer does not give ``[B, H, N, D]``.

``F.scaled_dot_product_attention`` knows batches alone. Layers give heads among the images, ``[B * H, N, D]`` (SAM), or
in front of windows, ``[B, H, nW, N, D]`` (Hiera, NesT); only the layer knows how many it has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mimkernels.nn.sdpa import AttentionCall
from mimkernels.ops import AttentionOutput

__all__ = ["Arranged", "arranged"]

_NUMBERS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
# Layers that have windows behind heads, for where there are as many of both.
_HEADS_BEFORE_WINDOWS = ("timm.models.hiera.MaskUnitAttention", "timm.models.nest.Attention")


class Arranged(NamedTuple):
    """A call by images and heads.

    Attributes:
        call: what is computed, ``[B, H, N, D]``.
        note: what to know about it, or "".
        sizes: the layer's own sizes before ``[N, D]``, heads as an axis; None if it gave ``[B, H, N, D]`` or the like.
        axis: that of heads.
    """

    call: AttentionCall
    note: str = ""
    sizes: tuple[int, ...] | None = None
    axis: int = 0

    def restored(self, output: AttentionOutput, layers: AttentionCall) -> AttentionOutput:
        """Output and lse as the layer's own call would have given them; statistics stay by heads."""
        if self.sizes is None:
            return output
        others = [size for axis, size in enumerate(self.sizes) if axis != self.axis]
        before = layers.q.shape[:2]
        out, lse = (
            tensor.unflatten(0, others).movedim(len(others), self.axis).reshape(*before, *tensor.shape[2:])
            for tensor in (output.out, output.lse)
        )
        return output._replace(out=out, lse=lse)


def arranged(call: AttentionCall, layer: nn.Module) -> Arranged:
    """A call that `layer` made, with its heads where ``[B, H, N, D]`` has them."""
    leading = tuple(call.leading)
    if len(leading) in (0, 2):
        return Arranged(call)
    shown = f"queries are {[*leading, *call.q.shape[2:]]}"
    heads = next((count for name in _NUMBERS if type(count := getattr(layer, name, None)) is int and count > 0), None)
    if len(leading) == 1:
        if heads is None or leading[0] % heads:
            return Arranged(call, f"{shown}: counted as one head")
        return Arranged(call) if heads == 1 else _moved(call, (leading[0] // heads, heads), 1)
    axes = [axis for axis in range(1, len(leading)) if leading[axis] == heads]
    last = len(leading) - 1
    if not axes:
        return Arranged(call, f"{shown}: counted as {leading[-1]} heads")
    if len(axes) == 1 or any(_name(kind) in _HEADS_BEFORE_WINDOWS for kind in type(layer).__mro__):
        return Arranged(call) if axes[0] == last else _moved(call, leading, axes[0])
    return Arranged(call, f"{shown}: which axis is heads is not known, counted as the last" if heads != 1 else "")


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _moved(call: AttentionCall, sizes: tuple[int, ...], axis: int) -> Arranged:
    def moved(tensor: Tensor) -> Tensor:
        rest = tensor.shape[2:]
        return tensor.reshape(*sizes, *rest).movedim(axis, len(sizes) - 1).flatten(0, len(sizes) - 2)

    bias, key_mask = call.bias, call.key_mask
    batch, inner, queries, _ = call.q.shape
    if key_mask is not None:  # of what need not be an image
        hidden = torch.zeros_like(key_mask, dtype=call.q.dtype).masked_fill(~key_mask, float("-inf"))
        of_keys = hidden[:, None, None].expand(-1, -1, queries, -1)
        bias, key_mask = (of_keys if bias is None else bias + of_keys), None
    if bias is not None and bias.shape[:2] != (1, 1):
        bias = moved(bias.expand(batch, inner, -1, -1))
    q, k, v = map(moved, (call.q, call.k, call.v))
    return Arranged(call._replace(q=q, k=k, v=v, bias=bias, key_mask=key_mask), "", sizes, axis)
