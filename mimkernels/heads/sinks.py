"""Attention sinks: the token that receives most attention, without the attention matrix."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SINKS", "sink_of"]

# Quantities of ``QUANTITIES``, all from the mean attention that keys receive.
SINKS = ("sink_attention", "sink_is_cls", "sink_is_prefix", "sink_value_norm")


def sink_of(name: str, received: Tensor, num_prefix: int, v: Tensor | None = None) -> Tensor:
    """One number of the sink of every image and head, the token that receives most attention.

    Args:
        name: ``sink_attention``, the share of attention that it receives (1 / N were uniform); ``sink_is_cls`` and
            ``sink_is_prefix``, 1 where it is the first prefix token or any of them; ``sink_value_norm``, the norm of
            its value relative to the mean norm: near 0, attending to it does nothing.
        received: ``[B, H, N]`` from ``received_attention``.
        num_prefix: P, leading tokens that are no patches.
        v: ``[B, H, N, D]``, for ``sink_value_norm``.

    Returns:
        ``[B, H]`` fp32.
    """
    share, token = received.max(-1)
    if name == "sink_attention":
        return share
    if name == "sink_value_norm":
        assert v is not None
        norms: Tensor = torch.linalg.vector_norm(v.detach(), dim=-1, dtype=torch.float32)
        relative: Tensor = norms.gather(-1, token[..., None])[..., 0] / norms.mean(-1)
        return relative
    return (token < (min(1, num_prefix) if name == "sink_is_cls" else num_prefix)).float()
