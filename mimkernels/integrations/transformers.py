"""``attn_implementation="mimkernels"`` for models of transformers; importing this module registers it.

Example::

    import mimkernels.integrations.transformers
    model = ViTModel.from_pretrained(name, attn_implementation="mimkernels")   # or set_attn_implementation

For every model that goes through transformers' ``AttentionInterface``, such as ViT, ViT-MAE, DINOv2 (with registers),
DINOv3 and BEiT. Masks, position biases and grouped heads are prepared by transformers as they are for ``"sdpa"``; calls
that ``mimkernels.attention`` does not take, such as dropout in training, go to PyTorch as they would. With
``output_attentions=True``, attention maps are computed step by step in that call, as by ``"eager"``.
"""

from __future__ import annotations

import functools
import warnings
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError(
        f"mimkernels.integrations.transformers needs transformers with its AttentionInterface (4.53 or newer), which "
        f"cannot be imported ({error}); pip install transformers"
    ) from error

from mimkernels.integrations._reroute import rerouted
from mimkernels.nn.sdpa.stand_in import scaled_dot_product_attention

__all__ = ["mimkernels_attention_forward"]

_forward = rerouted(cast(FunctionType, sdpa_attention_forward), scaled_dot_product_attention)


def mimkernels_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for ``"mimkernels"``; arguments as of its ``sdpa_attention_forward``.

    Returns:
        ``[B, Nq, H, D]``, and the attention matrix ``[B, H, Nq, Nk]``, after dropout, if ``output_attentions`` asks for
        it (there is a warning, once); else None, and it never exists.
    """
    wants_maps = kwargs.pop("output_attentions", None)
    if wants_maps is None:
        wants_maps = getattr(getattr(module, "config", None), "output_attentions", False)
    if not wants_maps:
        return _forward(module, query, key, value, attention_mask, **kwargs)
    if not torch.compiler.is_compiling():
        _warn_of_maps()
    # The matrix is what attention makes of values that are the identity: transformers' own code makes it, whatever
    # masks, position biases and grouped heads it is given.
    batch, heads, keys, _ = value.shape
    identity = torch.eye(keys, dtype=value.dtype, device=value.device).expand(batch, heads, keys, keys)
    maps = _forward(module, query, key, identity, attention_mask, **kwargs)[0].transpose(1, 2)
    out = maps @ value.repeat_interleave(maps.shape[1] // heads, dim=1)
    return out.transpose(1, 2).contiguous(), maps


@functools.cache
def _warn_of_maps() -> None:
    warnings.warn(
        'attn_implementation="mimkernels" computes and stores the attention maps that output_attentions=True asks for, '
        "as slowly as eager; mimkernels.capture(model, ...) gives statistics of them without",
        stacklevel=3,
    )


AttentionInterface.register("mimkernels", mimkernels_attention_forward)
AttentionMaskInterface.register("mimkernels", sdpa_mask)
