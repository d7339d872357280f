"""Window attention of timm's Swin and Swin V2 under ``mimkernels.accelerate``, against itself: forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import nn

import mimkernels
from mimkernels.commands.bench.cases.step import Step, autocast
from mimkernels.commands.bench.timing import Benchmark

_BLOCKS: dict[str, Any] = {"Swin": SwinTransformerBlock, "Swin V2": SwinTransformerV2Block}


@dataclass(frozen=True)
class Stage:
    """Side x side tokens of an image with D features in windows of a side each, H heads."""

    side: int
    dim: int
    heads: int
    window: int

    def __str__(self) -> str:
        return f"{self.side} x {self.side} tokens, window {self.window}, H={self.heads} D={self.dim // self.heads}"


STAGES = (Stage(56, 128, 4, 7), Stage(14, 512, 16, 7))  # the first and third of Swin-B at 224 pixels


def window_cases(batch: int, dtype: torch.dtype, device: str) -> Iterator[Benchmark]:
    for stage in STAGES:
        for kind in _BLOCKS:
            for shifted in (False, True):
                yield window_case(kind, stage, shifted, Step("", batch, dtype, device))


def window_case(kind: str, stage: Stage, shifted: bool, step: Step) -> Benchmark:
    """The attention module of a block, from tokens in windows to the gradients of tokens and weights."""
    torch.manual_seed(0)
    shift = stage.window // 2 if shifted else 0
    stock = _BLOCKS[kind](stage.dim, (stage.side, stage.side), stage.heads, window_size=stage.window, shift_size=shift)
    stock.to(step.device)
    ours = copy.deepcopy(stock)
    mimkernels.accelerate(ours)
    windows = step.batch * (stage.side // stage.window) ** 2
    x = torch.randn(windows, stage.window**2, stage.dim, device=step.device, requires_grad=True)
    upstream = torch.randn_like(x)

    def training(block: nn.Module) -> Callable[[], tuple[torch.Tensor, ...]]:
        module: Any = block
        inputs = [x, *(weight for weight in module.attn.parameters() if weight.requires_grad)]

        def run() -> tuple[torch.Tensor, ...]:
            with autocast(step):
                out = module.attn(x, mask=module.attn_mask)
            return torch.autograd.grad(out, inputs, upstream.to(out.dtype))

        return run

    versions: dict[str, Callable[[], object]] = {"ours": training(ours), "plain": training(stock)}

    def check() -> None:
        tolerance = 1e-3 if step.dtype == torch.float32 else 5e-2
        for got, expected in zip(training(ours)(), training(stock)(), strict=True):
            # Gradients of weights are sums over all windows: compared beside their largest.
            most = expected.abs().max().clamp(min=1.0)
            torch.testing.assert_close(got / most, expected / most, rtol=tolerance, atol=tolerance)

    return Benchmark(
        name=f"window attention of {kind}{', shifted' if shifted else ''}, forward + backward",
        shape=f"B={step.batch} {stage}",
        versions=versions,
        check=check,
        details=lambda: {"images": step.batch},
    )
