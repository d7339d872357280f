"""Fused kernels for Masked Image Modeling with Vision Transformers: token gathering, attention, pooling."""

from mimkernels._version import __version__
from mimkernels.ops import (
    TokenMask,
    fill_mask_tokens,
    gather_tokens,
    mask_from_noise,
    masked_patch_loss,
    patchify_gather,
    random_mask,
    restore_tokens,
    use_backend,
)

__all__ = [
    "TokenMask",
    "__version__",
    "fill_mask_tokens",
    "gather_tokens",
    "mask_from_noise",
    "masked_patch_loss",
    "patchify_gather",
    "random_mask",
    "restore_tokens",
    "use_backend",
]
