"""A timm model before and after ``mimkernels.accelerate``: forward pass and training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

import mimkernels
from mimkernels.bench.harness import Benchmark


def model_cases(name: str, batch: int, dtype: torch.dtype, device: str) -> Iterator[Benchmark]:
    import timm

    torch.manual_seed(0)
    stock = timm.create_model(name, num_classes=1000).to(device)
    ours = copy.deepcopy(stock)
    mimkernels.accelerate(ours)
    images = torch.randn(batch, *stock.default_cfg["input_size"], device=device)
    targets = torch.randint(1000, (batch,), device=device)

    def forward(model: nn.Module) -> Callable[[], torch.Tensor]:
        @torch.no_grad()
        def run() -> torch.Tensor:
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                return model.eval()(images)

        return run

    def step(model: nn.Module) -> Callable[[], torch.Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

        def run() -> torch.Tensor:
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(model.train()(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return run

    def check() -> None:
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(forward(ours)(), forward(stock)(), rtol=tolerance, atol=tolerance)

    # Training moves the weights of both, by different roundings: only the first is checked.
    for what, of, gate in (("forward", forward, check), ("training step", step, lambda: None)):
        yield Benchmark(
            name=f"accelerate, {what}",
            shape=f"{name} B={batch}",
            versions={"ours": of(ours), "plain": of(stock)},
            check=gate,
            details=lambda: {"images": batch},
        )
