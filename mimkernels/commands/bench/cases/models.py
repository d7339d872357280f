"""A timm model before and after ``mimkernels.accelerate``: forward pass and training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F

import mimkernels
from mimkernels.commands.bench.cases.step import Step, autocast, training
from mimkernels.commands.bench.timing import Benchmark


def model_cases(step: Step) -> Iterator[Benchmark]:
    torch.manual_seed(0)
    stock = timm.create_model(step.model, num_classes=1000).to(step.device)
    ours = copy.deepcopy(stock)
    mimkernels.accelerate(ours)
    config: Any = stock.default_cfg
    images = torch.randn(step.batch, *config["input_size"], device=step.device)
    targets = torch.randint(1000, (step.batch,), device=step.device)

    def forward(model: nn.Module) -> Callable[[], torch.Tensor]:
        @torch.no_grad()
        def run() -> torch.Tensor:
            with autocast(step):
                return model.eval()(images)

        return run

    def train(model: nn.Module) -> Callable[[], object]:
        return training(model, lambda: F.cross_entropy(model.train()(images), targets), step)

    def check() -> None:
        tolerance = 1e-4 if step.dtype == torch.float32 else 5e-2
        torch.testing.assert_close(forward(ours)(), forward(stock)(), rtol=tolerance, atol=tolerance)

    # Training changes the weights of the two by different roundings: only the forward pass is checked.
    for what, of, gate in (("forward", forward, check), ("training step", train, lambda: None)):
        yield Benchmark(
            name=f"accelerate, {what}",
            shape=str(step),
            versions={"ours": of(ours), "plain": of(stock)},
            check=gate,
            details=lambda: {"images": step.batch},
        )
