"""Padding: tokens that a mask hides from every query. They fill a batch up, and are no tokens of an image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mimkernels.heads.derived import HIDDEN
from mimkernels.nn.sdpa import AttentionCall

__all__ = ["padding_of", "without_padding"]


def padding_of(call: AttentionCall, num_prefix: int) -> Tensor | None:
    """The patches of a call of self-attention that no head of any query may attend to.

    Returns:
        ``[B, N]`` bool, False for prefix tokens; None if there are none such. Waits for the device if there is a mask.
    """
    batch, _, tokens, _ = call.q.shape
    if call.k.shape[2] != tokens or (call.bias is None and call.key_mask is None) or call.q.is_meta:
        return None
    hidden = call.q.new_zeros(batch, tokens, dtype=torch.bool)
    if call.key_mask is not None:
        hidden = hidden | ~call.key_mask
    if call.bias is not None:
        bias = call.bias[:, :, :1] if call.bias.stride(2) == 0 else call.bias  # [W, H or 1, 1 or N, N]
        of_windows = (bias <= HIDDEN).all(2).all(1)
        hidden = hidden | of_windows.repeat(batch // len(of_windows), 1)
    hidden[:, :num_prefix] = False
    return hidden if bool(hidden.any()) else None


def without_padding(
    padding: Tensor | None, num_prefix: int, rows: Mapping[str, Tensor], lse: Tensor, call: AttentionCall
) -> Iterator[tuple[dict[str, Tensor], Tensor, AttentionCall]]:
    """Row statistics, lse and call without padding: those of images that are padded alike, one after the other.

    Keys that are hidden have no probability, so that nothing of the other rows changes. Images of padding alone are
    left out.
    """
    if padding is None:
        yield dict(rows), lse, call
        return
    patterns, of_image = torch.unique(padding, dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        images, tokens = (of_image == number).nonzero()[:, 0], (~pattern).nonzero()[:, 0]
        if len(tokens) <= num_prefix:
            continue
        q, k, v = (tensor[images][:, :, tokens] for tensor in (call.q, call.k, call.v))
        bias, index, key_mask = call.bias, call.bias_index, call.key_mask
        if bias is not None:  # image b takes row b modulo W
            bias = bias[images % len(bias)][:, :, tokens][..., tokens]
        part = call._replace(
            q=q,
            k=k,
            v=v,
            bias=bias,
            bias_index=None if index is None else index[tokens][:, tokens],
            key_mask=None if key_mask is None else key_mask[images][:, tokens],
            packed=None,
        )
        yield {name: row[images][..., tokens] for name, row in rows.items()}, lse[images][..., tokens], part
