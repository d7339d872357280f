"""A user's file, which `make lint` checks as `mypy --strict` does: never executed."""

from collections.abc import Iterator
from typing import assert_type

from torch import Tensor, nn

import mimkernels
from mimkernels import (
    AttentionOutput,
    TokenMask,
    accelerate,
    attention,
    capture,
    keep_freed_memory,
    restore,
    use_backend,
)
from mimkernels.heads import RecordedHeads
from mimkernels.integrations.timm import Accelerated


def faster(model: nn.Module, batches: Iterator[Tensor]) -> list[Tensor]:
    assert_type(keep_freed_memory(), bool)
    accelerated = accelerate(model, pool=False)
    assert_type(accelerated, Accelerated)
    features: list[Tensor] = [model(images) for images in batches]
    assert_type(restore(model), int)
    return features


def entropies(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    with capture(model, ["entropy", "distance"], accumulate=False) as heads:
        model(images)
    assert_type(heads, RecordedHeads)
    return {name: layer.stats["entropy"] for name, layer in heads.items()}


def masked_step(x: Tensor, images: Tensor, pos: Tensor) -> Tensor:
    mask = mimkernels.random_mask(x.shape[0], x.shape[1], keep=49, seed=0, offset=3)
    assert_type(mask, TokenMask)
    visible = mimkernels.gather_tokens(x, mask.ids_keep, pos=pos)
    with use_backend("reference"):
        loss = mimkernels.masked_patch_loss(visible, images, ids=mask.ids_masked, patch_size=16)
    assert_type(loss, Tensor)
    return loss


def embedded(images: Tensor, weight: Tensor, feature: Tensor, noise: Tensor) -> Tensor:
    mask = mimkernels.mask_from_noise(noise, keep=49)
    rows = mimkernels.patchify_gather(images, mask.ids_keep, 16, mean=[0.5] * 3, std=(0.5, 0.5, 0.5))
    x = mimkernels.bias_gelu(rows @ weight, feature)
    residual, normalised = mimkernels.add_layer_norm(x, x, feature, feature)
    assert_type(residual, Tensor)
    full = mimkernels.restore_tokens(normalised, mask.ids_restore, feature)
    return mimkernels.fill_mask_tokens(full, mask.mask, feature)


def losses(pred: Tensor, features: Tensor, ids: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return mimkernels.masked_feature_loss(pred, features, ids) + mimkernels.upsample_cross_entropy(logits, labels)


def maps(qkv: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    lse = mimkernels.attention_qkvpacked(qkv).lse
    return mimkernels.attention_rows(q, k, [0]), mimkernels.head_divergence(q, k, lse)


def attended(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    result = attention(q, k, v, stats=("entropy",), num_prefix=1)
    assert_type(result, AttentionOutput)
    received = mimkernels.received_attention(q, k, result.lse)
    return result.out, received + result.stats["entropy"]


def pooled(x: Tensor, queries: Tensor, scores: Tensor) -> Tensor:
    out, weights = mimkernels.query_pool(x, queries, return_weights=True)
    assert_type(weights, Tensor)
    assert_type(mimkernels.weighted_pool(x, scores), Tensor)
    return out + mimkernels.reduce_pool(x, "mean", num_prefix=1)[:, None]
