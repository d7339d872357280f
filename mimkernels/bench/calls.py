"""What a call costs before any work is done: each public op on tiny inputs, beside a native op of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

import mimkernels as mk
from mimkernels.bench.harness import Benchmark
from mimkernels.ops.attention.spec import STATISTICS

CALLS = 100  # timed together


def call_cases(dtype: torch.dtype, device: str) -> Iterator[Benchmark]:
    for name, (ours, native) in calls(dtype, device).items():
        yield Benchmark(
            name=f"call of {name}",
            shape="B=1, 4 tokens of 8",
            versions={"ours": _often(ours), "native": _often(native)},
            details=lambda: {"calls": CALLS},
            on_host=True,
        )


def calls(dtype: torch.dtype, device: str) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Ours and a native op with as many inputs and outputs, where torch has one, by the name of ours."""
    x = torch.randn(1, 4, 8, device=device).to(dtype)
    ids = torch.tensor([[2, 0]], device=device)
    index = ids[:, :, None].expand(1, 2, 8)
    restore = torch.tensor([[1, 2, 0, 3]], device=device)
    noise = torch.rand(1, 4, device=device)
    mask = noise > 0.5
    token = torch.randn(1, 1, 8, device=device).to(dtype)
    images = torch.rand(1, 3, 8, 8, device=device).to(dtype)
    pred = torch.randn(1, 4, 48, device=device).to(dtype)
    q, k, v = torch.randn(3, 1, 2, 4, 8, device=device).to(dtype)
    lse = mk.attention(q, k, v).lse
    positions = torch.rand(4, 2, device=device)
    query = torch.randn(1, 8, device=device).to(dtype)
    leaf, leaves = x.clone().requires_grad_(), [t.clone().requires_grad_() for t in (q, k, v)]

    def sdpa():
        return F.scaled_dot_product_attention(q, k, v)

    def softmax_pool():
        return F.scaled_dot_product_attention(query[None], x, x)

    return {
        "random_mask": (lambda: mk.random_mask(1, 4, 2, 0, device=device), lambda: noise.argsort(1)),
        "mask_from_noise": (lambda: mk.mask_from_noise(noise, 2), lambda: noise.argsort(1)),
        "gather_tokens": (lambda: mk.gather_tokens(x, ids), lambda: x.gather(1, index)),
        "gather_tokens, differentiable": (lambda: mk.gather_tokens(leaf, ids), lambda: leaf.gather(1, index)),
        "restore_tokens": (lambda: mk.restore_tokens(x[:, :2], restore, token), lambda: x.gather(1, index)),
        "fill_mask_tokens": (
            lambda: mk.fill_mask_tokens(x, mask, token),
            lambda: torch.where(mask[..., None], token, x),
        ),
        "bias_gelu": (lambda: mk.bias_gelu(x, token[0, 0]), lambda: F.gelu(x)),
        "patchify_gather": (lambda: mk.patchify_gather(images, ids, 4), lambda: F.unfold(images, 4, stride=4)),
        "masked_patch_loss": (
            lambda: mk.masked_patch_loss(pred, images, mask=mask, patch_size=4),
            lambda: F.mse_loss(pred, pred),
        ),
        "attention": (lambda: mk.attention(q, k, v), sdpa),
        "attention, all statistics": (
            lambda: mk.attention(q, k, v, num_prefix=0, positions=positions, stats=STATISTICS),
            sdpa,
        ),
        "attention, differentiable": (
            lambda: mk.attention(*leaves),
            lambda: F.scaled_dot_product_attention(*leaves),
        ),
        "received_attention": (lambda: mk.received_attention(q, k, lse), sdpa),
        "head_divergence": (lambda: mk.head_divergence(q, k, lse), sdpa),
        "query_pool": (lambda: mk.query_pool(x, query), softmax_pool),
        "weighted_pool": (lambda: mk.weighted_pool(x, noise), lambda: torch.bmm(noise[:, None].to(dtype), x)),
        "reduce_pool": (lambda: mk.reduce_pool(x, "mean"), lambda: x.mean(1)),
    }


def _often(run: Callable[[], object]) -> Callable[[], None]:
    def calls():
        for _ in range(CALLS):
            run()

    return calls
