"""A whole MAE training step: ours against the published code's, images per second and where the time goes.

Both sides have the same weights, timm blocks, fused AdamW and images. The published side (arXiv:2111.06377) embeds
every patch, gathers with ``torch.gather``, predicts every patch and builds every target; its attention is
``scaled_dot_product_attention``, or, where head statistics are wanted, the attention matrix and the statistics of it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from mimkernels.commands.bench.cases.attention import MEASURED, plain_statistics
from mimkernels.commands.bench.cases.gathering import published_loss, published_random_masking
from mimkernels.commands.bench.cases.loading import MEAN, STD, Pictures
from mimkernels.commands.bench.timing import Benchmark
from mimkernels.engine.hardware import default_workers
from mimkernels.models import MAE

KINDS = ("GEMM", "attention", "token movement", "loss", "optimizer", "elementwise")


@dataclass(frozen=True)
class Step:
    """A timm encoder, B images per step, the dtype of autocast, and whether the models are also compiled."""

    model: str = "vit_base_patch16_224"
    batch: int = 8
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.model} B={self.batch}"


class PublishedMAE(nn.Module):
    """The published forward pass on the parameters of `mae`, whose attention, MLPs and blocks are timm's."""

    def __init__(self, mae: MAE) -> None:
        super().__init__()
        self.mae = mae

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        mae, encoder = self.mae, self.mae.encoder
        assert encoder.pos_embed is not None and encoder.cls_token is not None
        x = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
        keep = int(x.shape[1] * (1 - mae.mask_ratio))
        x, mask, ids_restore = published_random_masking(x, noise, keep)
        cls = encoder.cls_token + encoder.pos_embed[:, :1]
        x = torch.cat((cls.expand(x.shape[0], -1, -1), x), dim=1)
        x = encoder.norm(encoder.blocks(x))
        x = mae.decoder_embed(x)
        mask_tokens = mae.mask_token.repeat(x.shape[0], ids_restore.shape[1] + 1 - x.shape[1], 1)
        patches = torch.cat((x[:, 1:], mask_tokens), dim=1)
        patches = torch.gather(patches, 1, ids_restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        x = torch.cat((x[:, :1], patches), dim=1) + mae.decoder_pos_embed
        for block in mae.decoder_blocks:
            x = block(x)
        pred = mae.decoder_pred(mae.decoder_norm(x))[:, 1:]
        return published_loss(images, pred, mask, mae.patch_size[0])


class MaterialisedAttention(Attention):
    """timm's attention as one writes it to see the heads: the matrix, and statistics of it."""

    distances: Tensor | None = None  # [B, N, N] of the visible tokens, set before each step

    # Whatever else timm hands over is for attention that it masks.
    def forward(self, x: Tensor, **_: object) -> Tensor:  # type: ignore[override]
        assert self.distances is not None
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        p = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        with torch.no_grad():
            self.seen = plain_statistics(p.float(), self.distances[:, None])
        return self.proj((p @ v).transpose(1, 2).reshape(batch, tokens, dim))


def step_cases(step: Step) -> Iterator[Benchmark]:
    """The step, with images loaded from files, and with all head statistics of every encoder block."""
    yield step_case(step)
    with Pictures() as pictures:
        yield step_case(step, pictures=pictures)
    yield step_case(step, stats=True)


def step_case(step: Step, *, stats: bool = False, pictures: Pictures | None = None) -> Benchmark:
    torch.manual_seed(0)
    # Images from files stay uint8 until our kernels normalise them; the published code's loader does that.
    mean, std = (MEAN, STD) if pictures else (None, None)
    ours = MAE.from_timm(step.model, mean=mean, std=std).to(step.device)
    plain = MAE.from_timm(step.model, attention="timm", mlp="timm", block="timm").to(step.device)
    plain.load_state_dict(ours.state_dict())
    published = PublishedMAE(plain)
    layers: list[Any] = [block.attn for block in plain.encoder.blocks]
    if stats:
        for layer in layers:
            layer.__class__ = MaterialisedAttention
    wanted = MEASURED if stats else ()
    patches = plain.grid_size[0] * plain.grid_size[1]
    grid = torch.cartesian_prod(*(torch.arange(float(side), device=step.device) for side in plain.grid_size))
    steps = torch.zeros((), dtype=torch.int64, device=step.device)
    images = torch.randn(step.batch, 3, 224, 224, device=step.device)
    our_batches: Iterator[Tensor] = itertools.repeat(images)
    plain_batches: Iterator[Tensor] = itertools.repeat(images)
    if pictures:
        workers = default_workers()
        our_batches, plain_batches = pictures.trainer(step.batch, workers), pictures.published(step.batch, workers)

    def next_of(batches: Iterator[Tensor]) -> Tensor:
        return next(batches).to(step.device, non_blocking=True)

    def our_loss(model: Callable[..., Any] = ours) -> Tensor:
        steps.add_(1)
        return model(next_of(our_batches), seed=0, offset=steps, head_stats=wanted).loss

    def plain_loss(model: Callable[..., Any] = published) -> Tensor:
        return plain_loss_of(next_of(plain_batches), torch.rand(step.batch, patches, device=step.device), model)

    def plain_loss_of(images: Tensor, noise: Tensor, model: Callable[..., Any] = published) -> Tensor:
        if stats:
            # The kept patches are computed again: the published masking does not return them.
            ids = noise.argsort(dim=1)[:, : int(patches * (1 - plain.mask_ratio))]
            distances = F.pad(torch.cdist(grid[ids], grid[ids]), (1, 0, 1, 0))
            for layer in layers:
                layer.distances = distances
        return model(images, noise)

    def check() -> None:
        noise = torch.rand(step.batch, patches, device=step.device)
        given, normal = images, images
        if pictures:
            given = next_of(our_batches)
            means, stds = (torch.tensor(v, device=step.device)[:, None, None] for v in (MEAN, STD))
            normal = (given / 255 - means) / stds
        tolerance = 1e-4 if step.dtype == torch.float32 else 2e-2
        with autocast(step), torch.no_grad():
            got, expected = ours(given, noise=noise, head_stats=wanted).loss, plain_loss_of(normal, noise)
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)

    versions = {"ours": training(ours, our_loss, step), "plain": training(plain, plain_loss, step)}
    if step.compiled and not stats:
        fused, compiled = torch.compile(ours), torch.compile(published)
        versions["ours, compiled"] = training(ours, lambda: our_loss(fused), step)
        versions["compiled"] = training(plain, lambda: plain_loss(compiled), step)

    def details() -> dict:
        record: dict = {"images": step.batch}
        if not pictures:
            spent = {name: breakdown(run, step.device) for name, run in versions.items()}
            record["breakdown_ms"] = {
                name: {kind: round(1e3 * seconds, 2) for kind, seconds in parts.items()}
                for name, parts in spent.items()
            }
        return record

    what = ", with data loading" if pictures else ", all head statistics" if stats else ""
    return Benchmark(name=f"MAE step{what}", shape=str(step), versions=versions, check=check, details=details)


def training(model: nn.Module, loss: Callable[[], Tensor], step: Step) -> Callable[[], object]:
    """A step of a model: the loss under autocast, gradients, fused AdamW."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def run() -> Tensor:
        with autocast(step):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return run


def autocast(step: Step) -> contextlib.AbstractContextManager:
    if step.dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(step.device, step.dtype)


def breakdown(run: Callable[[], object], device: str, steps: int = 2) -> dict[str, float]:
    """Seconds of one step by kind of work, from torch's profiler: each operation's own time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            run()
    self_time = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    seconds = dict.fromkeys(KINDS, 0.0)
    for entry in profile.key_averages():
        seconds[kind_of(entry.key)] += getattr(entry, self_time) / 1e6 / steps
    return seconds


_NAMES = (
    ("optimizer", ("adamw", "optimizer")),
    ("attention", ("attention", "softmax", "flash", "fmha")),
    ("loss", ("masked_patch_loss",)),
    (
        "token movement",
        ("gather", "scatter", "index", "restore_tokens", "fill_mask_tokens", "random_mask", "mask_from_noise",
         "patchify", "sort", "cat"),
    ),
    ("GEMM", ("addmm", "::mm", "bmm", "baddbmm", "matmul", "linear", "convolution", "gemm", "cutlass", "nvjet")),
)  # fmt: skip


def kind_of(operation: str) -> str:
    """Which of ``KINDS`` an operation's or kernel's name belongs to."""
    name = operation.lower()
    return next((kind for kind, parts in _NAMES if any(part in name for part in parts)), "elementwise")
