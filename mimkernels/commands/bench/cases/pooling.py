"""Pooling against the plain PyTorch expressions, as the published code writes them, and ``torch.compile`` of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch

import mimkernels as mk
from mimkernels.commands.bench.cases.gathering import Size, same
from mimkernels.commands.bench.timing import Benchmark

QUERIES = 32  # of efficient probing
KINDS = ("mean", "max", "gem")
Outputs = torch.Tensor | tuple[torch.Tensor, ...]


def pooling_cases(size: Size, dtype: torch.dtype, device: str, compiled: bool = True) -> Iterator[Benchmark]:
    makers: list[Callable[..., Benchmark]] = [
        abmilp,
        efficient_probing,
        *(functools.partial(reduction, kind=kind) for kind in KINDS),
    ]
    for make, backward in itertools.product(makers, (False, True)):
        torch._dynamo.reset()
        yield make(size, dtype, device, backward, compiled)


def abmilp(size: Size, dtype: torch.dtype, device: str, backward: bool, compiled: bool) -> Benchmark:
    """AbMILP of depth 1: one query, whose scores are those of ``Linear(D, 1)``."""
    x = tokens(size, size.dim, dtype, device, backward)
    query = (torch.randn(1, size.dim, device=device) / size.dim**0.5).to(dtype).requires_grad_(backward)

    def plain():
        weights = (x @ query.T).softmax(1)
        return weights.transpose(1, 2) @ x

    def ours():
        return mk.query_pool(x, query, scale=1.0)

    # Backward, the tokens are read for the gradient of the weights and again for that of the query.
    moved = 4 * [x] if backward else [x]
    flops = 4 * size.batch * size.tokens * size.dim
    return differentiable_case("query_pool, AbMILP", size, ours, plain, [x, query], moved, backward, compiled, flops)


def efficient_probing(size: Size, dtype: torch.dtype, device: str, backward: bool, compiled: bool) -> Benchmark:
    """32 queries, each of which pools its own slice of projected tokens; the projection itself is not timed."""
    x = tokens(size, size.dim, dtype, device, False)
    values = tokens(size, size.dim, dtype, device, backward)
    queries = torch.randn(QUERIES, size.dim, device=device).to(dtype).requires_grad_(backward)

    def plain():
        weights = (size.dim**-0.5 * queries @ x.transpose(1, 2)).softmax(-1)
        slices = values.unflatten(2, (QUERIES, -1)).transpose(1, 2)
        return (weights[:, :, None] @ slices).squeeze(2)

    def ours():
        return mk.query_pool(x, queries, values=values, sliced=True)

    moved = [x, values, values, x, values] if backward else [x, values]
    flops = 2 * (QUERIES + 1) * size.batch * size.tokens * size.dim
    return differentiable_case(
        f"query_pool, EP of {QUERIES}", size, ours, plain, [values, queries], moved, backward, compiled, flops
    )


def reduction(size: Size, dtype: torch.dtype, device: str, backward: bool, compiled: bool, kind: str) -> Benchmark:
    x = tokens(size, size.dim, dtype, device, backward)
    p = torch.full((1,), 3.0, device=device, requires_grad=backward)

    def plain():
        if kind == "mean":
            return x.mean(1)
        if kind == "max":
            return x.max(1).values
        return x.float().clamp(min=1e-6).pow(p).mean(1).pow(1 / p).to(dtype)

    def ours():
        return mk.reduce_pool(x, kind, p=p if kind == "gem" else 3.0)

    leaves = [x, p] if kind == "gem" else [x]
    moved = (3 if kind == "gem" else 2) * [x] if backward else [x]
    return differentiable_case(f"reduce_pool, {kind}", size, ours, plain, leaves, moved, backward, compiled)


def tokens(size: Size, dim: int, dtype: torch.dtype, device: str, requires_grad: bool) -> torch.Tensor:
    return torch.randn(size.batch, size.tokens, dim, device=device).to(dtype).requires_grad_(requires_grad)


def differentiable_case(
    name: str,
    size: object,
    ours: Callable[[], Outputs],
    plain: Callable[[], Outputs],
    leaves: list[torch.Tensor],
    moved: list[torch.Tensor],
    backward: bool,
    compiled: bool,
    flops: int | None = None,
) -> Benchmark:
    """The op alone, or with the gradients of the leaves; ``moved`` are read or written once each.

    flops: of the products forward; backward has twice as many.
    """
    upstream = tuple(torch.randn_like(out) for out in _parts(plain()))

    def timed(run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        return (lambda: torch.autograd.grad(_parts(run()), leaves, upstream)) if backward else run

    def check():
        tolerance = 1e-3 if all(grad.dtype == torch.float32 for grad in upstream) else 5e-2
        for got, expected in zip(_parts(timed(ours)()), _parts(timed(plain)()), strict=True):
            largest = float(expected.detach().abs().max())
            same(got / largest, expected / largest, tolerance)

    versions: dict[str, Callable[[], object]] = {"ours": timed(ours), "plain": timed(plain)}
    if compiled:
        versions["compiled"] = timed(torch.compile(plain, dynamic=False))
    direction = "forward + backward" if backward else "forward"
    moved_bytes = sum(x.numel() * x.element_size() for x in moved)
    name = f"{name}, {direction}"
    return Benchmark(
        name=name,
        shape=str(size),
        versions=versions,
        moved_bytes=moved_bytes,
        flops=flops and (3 * flops if backward else flops),
        check=check,
    )


def _parts(outputs: Outputs) -> tuple[torch.Tensor, ...]:
    return (outputs,) if isinstance(outputs, torch.Tensor) else outputs
