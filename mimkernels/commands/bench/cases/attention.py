"""Attention with statistics against SDPA without any, and against materialised attention with the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

import mimkernels as mk
from mimkernels.commands.bench.timing import Benchmark, runs
from mimkernels.ops.attention.spec import STATISTICS


@dataclass(frozen=True)
class Shape:
    """B images, H heads of D features, N tokens of which the first is [cls]."""

    batch: int
    heads: int
    tokens: int
    dim: int

    def __str__(self) -> str:
        return f"B={self.batch} H={self.heads} N={self.tokens} D={self.dim}"


# ViT-B's encoder with 75 % masked, whole, and MAE's decoder; on a CPU, which computes long rows otherwise, also whole
# images of 384 and 512 pixels.
CPU_SHAPES = (
    Shape(8, 12, 50, 64),
    Shape(8, 12, 197, 64),
    Shape(8, 16, 197, 32),
    Shape(2, 12, 577, 64),
    Shape(1, 12, 1025, 64),
)
CUDA_SHAPES = (Shape(256, 12, 50, 64), Shape(256, 12, 197, 64), Shape(256, 16, 197, 32))


def attention_cases(dtype: torch.dtype, device: str) -> Iterator[Benchmark]:
    for shape in CUDA_SHAPES if device == "cuda" else CPU_SHAPES:
        for backward in (False, True):
            yield attention_case(shape, dtype, device, backward)
        yield packed_case(shape, dtype, device)


# All but those of single scores, which came after the committed results.
MEASURED = tuple(name for name in STATISTICS if name not in ("max_score", "argmax"))


def attention_case(shape: Shape, dtype: torch.dtype, device: str, backward: bool) -> Benchmark:
    packed = torch.randn(shape.batch, shape.tokens, 3, shape.heads, shape.dim, device=device).to(dtype)
    q, k, v = (x.requires_grad_(backward) for x in packed.permute(2, 0, 3, 1, 4).unbind(0))
    side = round((shape.tokens - 1) ** 0.5)
    axis = torch.arange(side, dtype=torch.float32, device=device)
    positions = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).flatten(0, 1)
    distances = F.pad(torch.cdist(positions, positions), (1, 0, 1, 0))
    upstream = torch.randn(shape.batch, shape.heads, shape.tokens, shape.dim, device=device).to(dtype)
    row_upstream = torch.randn(shape.batch, shape.heads, shape.tokens, device=device)

    def ours(stats: tuple[str, ...]) -> Callable[[], object]:
        def run():
            result = mk.attention(q, k, v, num_prefix=1, positions=positions, stats=stats)
            return finish(result.out, result.stats)

        return run

    def sdpa():
        return finish(F.scaled_dot_product_attention(q, k, v), {})

    def xformers():
        from xformers.ops import memory_efficient_attention  # wants [B, N, H, D]

        return finish(memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), {})

    def materialised():
        p = (q @ k.transpose(-2, -1) * shape.dim**-0.5).softmax(dim=-1)
        return finish(p @ v, plain_statistics(p.float(), distances))

    def finish(out: torch.Tensor, stats: dict[str, torch.Tensor]):
        if not backward:
            return out, stats
        differentiable = [values for name, values in stats.items() if name != "peak"]
        return torch.autograd.grad(
            [out, *differentiable], [q, k, v], [upstream, *(row_upstream for _ in differentiable)]
        )

    def check():
        tolerance = 1e-3 if dtype == torch.float32 else 5e-2
        for got, expected in zip(_tensors(ours(MEASURED)()), _tensors(materialised()), strict=True):
            torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=tolerance)

    versions = {
        "ours": ours(MEASURED),
        "entropy": ours(("entropy",)),
        "bare": ours(()),
        "sdpa": sdpa,
        "plain": materialised,
    }
    if runs(xformers):
        versions["xformers"] = xformers
    return Benchmark(
        name=f"attention, {'forward + backward' if backward else 'forward'}",
        shape=str(shape),
        versions=versions,
        flops=(14 if backward else 4) * shape.batch * shape.heads * shape.tokens**2 * shape.dim,
        check=check,
    )


def packed_case(shape: Shape, dtype: torch.dtype, device: str) -> Benchmark:
    """Without statistics, from the packed projection to its gradient, as a layer trains."""
    qkv = torch.randn(shape.batch, shape.tokens, 3, shape.heads, shape.dim, device=device).to(dtype).requires_grad_()
    upstream = torch.randn(shape.batch, shape.tokens, shape.heads, shape.dim, device=device).to(dtype).transpose(1, 2)

    def gradient(out: torch.Tensor) -> torch.Tensor:
        (grad,) = torch.autograd.grad(out, qkv, upstream)
        return grad.reshape(shape.batch, shape.tokens, -1)  # as the projection's backward takes it

    def ours():
        return gradient(mk.attention_qkvpacked(qkv).out)

    def views():
        return gradient(mk.attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0)).out)

    def sdpa():
        return gradient(F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0)))

    def check():
        tolerance = 1e-3 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(ours().float(), sdpa().float(), rtol=tolerance, atol=tolerance)

    return Benchmark(
        name="packed attention, forward + backward",
        shape=str(shape),
        versions={"ours": ours, "views": views, "sdpa": sdpa},
        flops=14 * shape.batch * shape.heads * shape.tokens**2 * shape.dim,
        check=check,
    )


def plain_statistics(p: torch.Tensor, distances: torch.Tensor) -> dict[str, torch.Tensor]:
    """The statistics of attention matrices ``[B, H, N, N]`` whose first token is [cls], as one writes them."""
    patches = p[..., 1:]
    mass = patches.sum(-1)
    return {
        "entropy": torch.special.entr(p).sum(-1),
        "prefix_mass": p[..., 0],
        "self_mass": p.diagonal(dim1=-2, dim2=-1),
        "distance": (p * distances).sum(-1),
        "patch_entropy": torch.special.entr(patches / mass[..., None]).sum(-1),
        "peak": p.amax(-1),
        "patch_mass": mass,
    }


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in (result.values() if isinstance(result, dict) else result) for tensor in _tensors(part)]
