"""Modules and functions of Vision Transformers, built on the ops."""

from typing import TYPE_CHECKING, Any

from mimkernels.nn.embed import embed_visible
from mimkernels.nn.pooling import Pooling, build_pooling, cls_attention, poolings
from mimkernels.nn.positions import sincos_positions_2d

if TYPE_CHECKING:
    from mimkernels.nn.attention import Attention, HeadRecorder, LayerHeads, record_heads, use_mimkernels_attention

# From `attention`, which needs timm: imported when first asked for, so that the rest works without it.
_OF_ATTENTION = ("Attention", "HeadRecorder", "LayerHeads", "record_heads", "use_mimkernels_attention")

__all__ = [
    "Attention",
    "HeadRecorder",
    "LayerHeads",
    "Pooling",
    "build_pooling",
    "cls_attention",
    "embed_visible",
    "poolings",
    "record_heads",
    "sincos_positions_2d",
    "use_mimkernels_attention",
]


def __getattr__(name: str) -> Any:
    if name not in _OF_ATTENTION:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mimkernels.nn import attention

    return getattr(attention, name)
