"""A whole SimMIM training step: ours against the published code's around timm's encoder.

Both sides have the same weights, images and fused AdamW. The published side (arXiv:2111.09886) draws units on the host,
multiplies patches by the mask, predicts by a 1x1 convolution and a pixel shuffle, and compares whole images; timm's
attention is ``scaled_dot_product_attention`` where timm calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mimkernels.commands.bench.cases.step import Step, autocast, breakdown, training
from mimkernels.commands.bench.timing import Benchmark
from mimkernels.models import SimMIM
from mimkernels.models.masked_encoders import family_of

MODELS = ("beit_base_patch16_224", "swin_base_patch4_window7_224")


class PublishedSimMIM(nn.Module):
    """The published forward pass on the parameters of `simmim`, whose attention and MLPs are timm's."""

    def __init__(self, simmim: SimMIM) -> None:
        super().__init__()
        self.encoder, self.mask_token = simmim.encoder, simmim.mask_token
        self.patch, self.grid = simmim.patch_size[0], simmim.grid_size
        self.unit, self.mask_ratio = simmim.mask_unit, simmim.mask_ratio
        weights = simmim.simmim_state_dict()
        weight, self.stride = weights["decoder.0.weight"], simmim.encoder_stride[0]
        self.decoder = nn.Sequential(nn.Conv2d(weight.shape[1], weight.shape[0], 1), nn.PixelShuffle(self.stride))
        self.decoder.to(weight.device).load_state_dict({"0.weight": weight, "0.bias": weights["decoder.0.bias"]})

    def draw_mask(self, batch: int) -> Tensor:
        """``[B, h, w]`` in {0, 1} on the grid of patches, 1 = masked."""
        step = self.unit // self.patch
        rows, columns = (side // step for side in self.grid)
        masks = np.zeros((batch, rows * columns), dtype=np.float32)
        for mask in masks:
            mask[np.random.permutation(mask.size)[: int(np.ceil(mask.size * self.mask_ratio))]] = 1
        return torch.from_numpy(masks.reshape(batch, rows, columns).repeat(step, 1).repeat(step, 2))

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        encoder = self.encoder
        x = encoder.patch_embed(images)
        x = x.flatten(1, 2) if x.dim() == 4 else x  # of Swin [B, h, w, D]
        masked = mask.flatten(1).unsqueeze(-1).type_as(x)
        x = x * (1 - masked) + self.mask_token * masked
        x = family_of(encoder).run(encoder, x, self.grid)  # timm's blocks
        side = [length * self.patch // self.stride for length in self.grid]
        pred = self.decoder(x.transpose(1, 2).unflatten(2, side))
        hidden = mask.repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2).unsqueeze(1)
        error = (images.float() - pred.float()).abs()
        return (error * hidden).sum() / (hidden.sum() + 1e-5) / images.shape[1]


def simmim_case(step: Step, **model: Any) -> Benchmark:
    """The step of the timm model ``step.model``; `model` are further arguments of ``SimMIM.from_timm``."""
    torch.manual_seed(0)
    ours = SimMIM.from_timm(step.model, **model).to(step.device)
    stock = SimMIM.from_timm(step.model, **model, attention="timm", mlp="timm").to(step.device)
    stock.load_state_dict(ours.state_dict())
    plain = PublishedSimMIM(stock)
    steps = torch.zeros((), dtype=torch.int64, device=step.device)
    images = torch.randn(step.batch, 3, *ours.encoder.patch_embed.img_size, device=step.device)

    def our_loss(model: Callable[..., Any] = ours) -> Tensor:
        steps.add_(1)
        loss: Tensor = model(images, seed=0, offset=steps).loss
        return loss

    def plain_loss(model: Callable[..., Any] = plain) -> Tensor:
        loss: Tensor = model(images, plain.draw_mask(step.batch).to(step.device, non_blocking=True))
        return loss

    def check() -> None:
        mask = ours.draw_mask(images, seed=1)
        tolerance = 1e-4 if step.dtype == torch.float32 else 2e-2
        with autocast(step), torch.no_grad():
            got, expected = ours(images, mask=mask).loss, plain(images, mask.float())
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)

    versions = {"ours": training(ours, our_loss, step), "plain": training(plain, plain_loss, step)}
    if step.compiled:
        fused, compiled = torch.compile(ours), torch.compile(plain)
        versions["ours, compiled"] = training(ours, lambda: our_loss(fused), step)
        versions["compiled"] = training(plain, lambda: plain_loss(compiled), step)

    def details() -> dict:
        spent = {name: breakdown(run, step.device) for name, run in versions.items()}
        in_ms = {
            name: {kind: round(1e3 * seconds, 2) for kind, seconds in parts.items()} for name, parts in spent.items()
        }
        return {"images": step.batch, "breakdown_ms": in_ms}

    return Benchmark(name="SimMIM step", shape=str(step), versions=versions, check=check, details=details)
