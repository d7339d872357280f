"""Fused kernels for Masked Image Modeling with Vision Transformers: token gathering, attention, pooling."""

from importlib import import_module
from typing import Any

from mimkernels._version import __version__
from mimkernels.ops import (
    AttentionOutput,
    TokenMask,
    attention,
    attention_qkvpacked,
    attention_rows,
    bias_gelu,
    fill_mask_tokens,
    gather_tokens,
    head_divergence,
    mask_from_noise,
    masked_patch_loss,
    patchify_gather,
    query_pool,
    random_mask,
    received_attention,
    reduce_pool,
    restore_tokens,
    use_backend,
    weighted_pool,
)

__all__ = [
    "AttentionOutput",
    "TokenMask",
    "__version__",
    "accelerate",
    "attention",
    "attention_qkvpacked",
    "attention_rows",
    "bias_gelu",
    "capture",
    "fill_mask_tokens",
    "gather_tokens",
    "head_divergence",
    "mask_from_noise",
    "masked_patch_loss",
    "patchify_gather",
    "query_pool",
    "random_mask",
    "received_attention",
    "reduce_pool",
    "restore",
    "restore_tokens",
    "use_backend",
    "weighted_pool",
]


# The integrations stand above everything else: imported when first asked for.
_OF_INTEGRATIONS = {
    "accelerate": "mimkernels.integrations.timm",
    "capture": "mimkernels.heads",
    "restore": "mimkernels.integrations.timm",
}


def __getattr__(name: str) -> Any:
    if name not in _OF_INTEGRATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_OF_INTEGRATIONS[name]), name)
