"""What a call costs before any work is done: each public op on tiny inputs, beside a native op of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

import mimkernels as mk
from mimkernels.commands.bench.cases.attention import MEASURED
from mimkernels.commands.bench.timing import Benchmark

CALLS = 100  # timed together


def call_cases(dtype: torch.dtype, device: str) -> Iterator[Benchmark]:
    for name, (ours, native, door) in calls(dtype, device).items():
        yield Benchmark(
            name=f"call of {name}",
            shape="B=1, 4 tokens of 8",
            versions={"ours": _often(ours), "native": _often(native), "native through torch.ops": _often(door)},
            details=lambda: {"calls": CALLS},
            on_host=True,
        )


def calls(dtype: torch.dtype, device: str) -> dict[str, tuple[Callable[[], object], ...]]:
    """By the name of ours: ours, a native op with as many inputs and outputs where torch has one, and the native op
    reached as ours are, through ``torch.ops``."""
    aten = torch.ops.aten
    x = torch.randn(1, 4, 8, device=device).to(dtype)
    ids = torch.tensor([[2, 0]], device=device)
    index = ids[:, :, None].expand(1, 2, 8)
    restore = torch.tensor([[1, 2, 0, 3]], device=device)
    noise = torch.rand(1, 4, device=device)
    mask = noise > 0.5
    token = torch.randn(1, 1, 8, device=device).to(dtype)
    images = torch.rand(1, 3, 8, 8, device=device).to(dtype)
    pred = torch.randn(1, 4, 48, device=device).to(dtype)
    classes, labels = torch.randn(1, 8, 2, 2, device=device).to(dtype), torch.tensor([[[0, 1], [2, 3]]], device=device)
    q, k, v = torch.randn(3, 1, 2, 4, 8, device=device).to(dtype)
    lse = mk.attention(q, k, v).lse
    positions = torch.rand(4, 2, device=device)
    query = torch.randn(1, 8, device=device).to(dtype)
    packed = torch.randn(1, 4, 3, 2, 8, device=device).to(dtype).requires_grad_()
    leaf, leaves = x.clone().requires_grad_(), [t.clone().requires_grad_() for t in (q, k, v)]
    visible, where, weights, one = x[:, :2], mask[..., None], noise[:, None].to(dtype), query[None]
    bias = token[0, 0]

    def twice(native, op, *inputs, **options):
        return lambda: native(*inputs, **options), lambda: op(*inputs, **options)

    def sdpa(*tensors):
        return twice(F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default, *tensors)

    def of_parts(op):
        return lambda: op(*packed.permute(2, 0, 3, 1, 4).unbind(0))

    argsort = twice(torch.argsort, aten.argsort.default, noise, 1)
    gather = twice(torch.gather, aten.gather.default, x, 1, index)
    return {
        "random_mask": (lambda: mk.random_mask(1, 4, 2, 0, device=device), *argsort),
        "mask_from_noise": (lambda: mk.mask_from_noise(noise, 2), *argsort),
        "gather_tokens": (lambda: mk.gather_tokens(x, ids), *gather),
        "gather_tokens, differentiable": (
            lambda: mk.gather_tokens(leaf, ids),
            *twice(torch.gather, aten.gather.default, leaf, 1, index),
        ),
        "restore_tokens": (lambda: mk.restore_tokens(visible, restore, token), *gather),
        "fill_mask_tokens": (
            lambda: mk.fill_mask_tokens(x, mask, token),
            *twice(torch.where, aten.where.self, where, token, x),
        ),
        "patchify_gather": (
            lambda: mk.patchify_gather(images, ids, 4),
            lambda: F.unfold(images, 4, stride=4),
            lambda: aten.im2col.default(images, [4, 4], [1, 1], [0, 0], [4, 4]),
        ),
        "bias_gelu": (lambda: mk.bias_gelu(x, bias), *twice(F.gelu, aten.gelu.default, x)),
        "add_layer_norm": (
            lambda: mk.add_layer_norm(x, x, bias, bias),
            *twice(F.layer_norm, aten.layer_norm.default, x, [8], bias, bias),
        ),
        "masked_patch_loss": (
            lambda: mk.masked_patch_loss(pred, images, mask=mask, patch_size=4),
            *twice(F.mse_loss, aten.mse_loss.default, pred, pred),
        ),
        "masked_feature_loss": (
            lambda: mk.masked_feature_loss(visible, x, ids),
            *twice(F.smooth_l1_loss, aten.smooth_l1_loss.default, x, x),
        ),
        "upsample_cross_entropy": (
            lambda: mk.upsample_cross_entropy(classes, labels),
            *twice(F.cross_entropy, aten.cross_entropy_loss.default, classes, labels),
        ),
        "attention": (lambda: mk.attention(q, k, v), *sdpa(q, k, v)),
        "attention, all statistics": (
            lambda: mk.attention(q, k, v, num_prefix=0, positions=positions, stats=MEASURED),
            *sdpa(q, k, v),
        ),
        "attention, differentiable": (lambda: mk.attention(*leaves), *sdpa(*leaves)),
        "attention_qkvpacked, differentiable": (
            lambda: mk.attention_qkvpacked(packed),
            of_parts(F.scaled_dot_product_attention),
            of_parts(aten.scaled_dot_product_attention.default),
        ),
        "received_attention": (lambda: mk.received_attention(q, k, lse), *sdpa(q, k, v)),
        "head_divergence": (lambda: mk.head_divergence(q, k, lse), *sdpa(q, k, v)),
        "query_pool": (lambda: mk.query_pool(x, query), *sdpa(one, x, x)),
        "weighted_pool": (lambda: mk.weighted_pool(x, noise), *twice(torch.bmm, aten.bmm.default, weights, x)),
        "reduce_pool": (lambda: mk.reduce_pool(x, "mean"), *twice(torch.mean, aten.mean.dim, x, [1])),
    }


def _often(run: Callable[[], object]) -> Callable[[], None]:
    def calls():
        for _ in range(CALLS):
            run()

    return calls
