"""Modules with a plain and a fused branch of attention take the fused one, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def fused_attention(model: nn.Module) -> Iterator[None]:
    """Inside the block, timm's, transformers' and torch's modules call ``F.scaled_dot_product_attention``."""
    changed: list[tuple[Any, str, Any]] = []

    def change(owner: Any, name: str, value: Any) -> None:
        changed.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    # torch.nn.MultiheadAttention and TransformerEncoderLayer have a kernel of their own in eval mode.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module in model.modules():
            if getattr(module, "fused_attn", None) is False:  # timm
                change(module, "fused_attn", True)
            config = getattr(module, "config", None)
            # transformers; who asks for maps in the configuration, needs the branch that makes them.
            if (
                getattr(module, "_supports_sdpa", False)
                and getattr(config, "_attn_implementation", None) == "eager"
                and not getattr(config, "output_attentions", False)
            ):
                change(config, "_attn_implementation_internal", "sdpa")
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for owner, name, value in reversed(changed):
            setattr(owner, name, value)
