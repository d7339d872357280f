"""The ops, each in its folder: ``api.py`` for users, ``spec.py`` for its backends, one file per Python backend."""

from mimkernels.ops import _registry
from mimkernels.ops._registry import use_backend
from mimkernels.ops._token_mask import TokenMask
from mimkernels.ops.add_layer_norm import AddLayerNormOutput, add_layer_norm
from mimkernels.ops.attention import AttentionOutput, attention, attention_qkvpacked
from mimkernels.ops.attention_rows import attention_rows
from mimkernels.ops.bias_gelu import bias_gelu
from mimkernels.ops.fill_mask_tokens import fill_mask_tokens
from mimkernels.ops.gather_tokens import gather_tokens
from mimkernels.ops.head_divergence import head_divergence
from mimkernels.ops.mask_from_noise import mask_from_noise
from mimkernels.ops.masked_feature_loss import masked_feature_loss
from mimkernels.ops.masked_patch_loss import masked_patch_loss
from mimkernels.ops.patchify_gather import patchify_gather
from mimkernels.ops.query_pool import query_pool
from mimkernels.ops.random_mask import random_mask
from mimkernels.ops.received_attention import received_attention
from mimkernels.ops.reduce_pool import reduce_pool
from mimkernels.ops.restore_tokens import restore_tokens
from mimkernels.ops.upsample_cross_entropy import upsample_cross_entropy
from mimkernels.ops.weighted_pool import weighted_pool

_registry.finish_loading()

__all__ = [
    "AddLayerNormOutput",
    "AttentionOutput",
    "TokenMask",
    "add_layer_norm",
    "attention",
    "attention_qkvpacked",
    "attention_rows",
    "bias_gelu",
    "fill_mask_tokens",
    "gather_tokens",
    "head_divergence",
    "mask_from_noise",
    "masked_feature_loss",
    "masked_patch_loss",
    "patchify_gather",
    "query_pool",
    "random_mask",
    "received_attention",
    "reduce_pool",
    "restore_tokens",
    "upsample_cross_entropy",
    "use_backend",
    "weighted_pool",
]
