"""Fused kernels for Masked Image Modeling with Vision Transformers: token gathering, attention, pooling."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mimkernels._version import __version__
from mimkernels.ops import (
    AddLayerNormOutput,
    AttentionOutput,
    TokenMask,
    add_layer_norm,
    attention,
    attention_qkvpacked,
    attention_rows,
    bias_gelu,
    fill_mask_tokens,
    gather_tokens,
    head_divergence,
    mask_from_noise,
    masked_feature_loss,
    masked_patch_loss,
    patchify_gather,
    query_pool,
    random_mask,
    received_attention,
    reduce_pool,
    restore_tokens,
    upsample_cross_entropy,
    use_backend,
    weighted_pool,
)

if TYPE_CHECKING:
    from mimkernels.engine.memory import keep_freed_memory
    from mimkernels.heads import capture
    from mimkernels.integrations.timm import accelerate, restore

__all__ = [
    "AddLayerNormOutput",
    "AttentionOutput",
    "TokenMask",
    "__version__",
    "accelerate",
    "add_layer_norm",
    "attention",
    "attention_qkvpacked",
    "attention_rows",
    "bias_gelu",
    "capture",
    "fill_mask_tokens",
    "gather_tokens",
    "head_divergence",
    "keep_freed_memory",
    "mask_from_noise",
    "masked_feature_loss",
    "masked_patch_loss",
    "patchify_gather",
    "query_pool",
    "random_mask",
    "received_attention",
    "reduce_pool",
    "restore",
    "restore_tokens",
    "upsample_cross_entropy",
    "use_backend",
    "weighted_pool",
]


# Imported at first use: they import this package, and the integrations stand above everything else.
_AT_FIRST_USE = {
    "accelerate": "mimkernels.integrations.timm",
    "capture": "mimkernels.heads",
    "keep_freed_memory": "mimkernels.engine.memory",
    "restore": "mimkernels.integrations.timm",
}


def __getattr__(name: str) -> Any:
    if name not in _AT_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_AT_FIRST_USE[name]), name)
