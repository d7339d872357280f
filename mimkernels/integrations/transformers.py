"""``attn_implementation="mimkernels"`` for models of transformers; importing this module registers it.

Example::

    import mimkernels.integrations.transformers
    model = ViTModel.from_pretrained(name, attn_implementation="mimkernels")   # or set_attn_implementation

For every model that goes through transformers' ``AttentionInterface``, such as ViT, ViT-MAE, DINOv2 (with registers),
DINOv3 and BEiT. Masks, position biases and grouped heads are prepared by transformers as they are for ``"sdpa"``; calls
that ``mimkernels.attention`` does not take, such as dropout in training, go to PyTorch as they would.
"""

from __future__ import annotations

from typing import Any

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
from mimkernels.integrations._sdpa import scaled_dot_product_attention

__all__ = ["mimkernels_attention_forward"]

_forward = rerouted(sdpa_attention_forward, scaled_dot_product_attention)


def mimkernels_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What transformers calls for ``"mimkernels"``; arguments and result as of its ``sdpa_attention_forward``.

    Returns:
        ``[B, Nq, H, D]``, and None for the attention matrix, which never exists.

    Raises:
        ValueError: ``output_attentions`` is asked for.
    """
    if kwargs.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        raise ValueError(
            'attn_implementation="mimkernels" has no attention matrix to return: output_attentions=True needs "eager"; '
            "statistics of it come from mimkernels.capture"
        )
    return _forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("mimkernels", mimkernels_attention_forward)
AttentionMaskInterface.register("mimkernels", sdpa_mask)
