"""Modules and functions of Vision Transformers, built on the ops."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mimkernels.nn.embedding import embed_visible
from mimkernels.nn.pooling import Pooling, build_pooling, cls_attention, poolings
from mimkernels.nn.positions import sincos_positions_2d

if TYPE_CHECKING:
    from mimkernels.nn.attention import Attention, use_mimkernels_attention
    from mimkernels.nn.block import Block, use_mimkernels_block
    from mimkernels.nn.mlp import Mlp, use_mimkernels_mlp

# From modules that need timm: imported when first asked for, so that the rest works without it.
_NEED_TIMM = {
    "Attention": "attention",
    "Block": "block",
    "Mlp": "mlp",
    "use_mimkernels_attention": "attention",
    "use_mimkernels_block": "block",
    "use_mimkernels_mlp": "mlp",
}

__all__ = [
    "Attention",
    "Block",
    "Mlp",
    "Pooling",
    "build_pooling",
    "cls_attention",
    "embed_visible",
    "poolings",
    "sincos_positions_2d",
    "use_mimkernels_attention",
    "use_mimkernels_block",
    "use_mimkernels_mlp",
]


def __getattr__(name: str) -> Any:
    if name not in _NEED_TIMM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NEED_TIMM[name]}"), name)
