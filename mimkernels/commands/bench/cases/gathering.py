"""The benchmark cases: ours against the plain PyTorch expression and ``torch.compile`` of it.

The plain versions state the published algorithms (MAE, arXiv:2111.06377; SimMIM, arXiv:2111.09886) in PyTorch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn import functional as F

import mimkernels as mk
from mimkernels.commands.bench.timing import Benchmark, runs


@dataclass(frozen=True)
class Size:
    """B images of N patch tokens of width D, K kept; square images with square patches."""

    batch: int = 64
    tokens: int = 196
    dim: int = 768
    keep: int = 49
    patch: int = 16

    @property
    def side(self) -> int:
        return int(self.tokens**0.5) * self.patch

    def __str__(self) -> str:
        return f"B={self.batch} N={self.tokens} D={self.dim} K={self.keep}"


def gathering_cases(size: Size, dtype: torch.dtype, device: str, compiled: bool = True) -> Iterator[Benchmark]:
    losses = (loss, loss_of_masked, loss_by_neighbourhood, loss_of_features)
    for make in (mask_and_gather, gather, restore, fill, *losses, embed_visible, patchify, patchify_uint8):
        benchmark = make(size, dtype, device)
        if compiled:
            torch._dynamo.reset()
            benchmark.versions["compiled"] = torch.compile(benchmark.versions["plain"], dynamic=False)
        yield benchmark


def mask_and_gather(size: Size, dtype: torch.dtype, device: str) -> Benchmark:
    x = torch.randn(size.batch, size.tokens, size.dim, device=device).to(dtype)
    steps = itertools.count()

    def plain():
        return published_random_masking(x, torch.rand(size.batch, size.tokens, device=x.device), size.keep)

    def ours():
        masks = mk.random_mask(size.batch, size.tokens, size.keep, seed=0, offset=next(steps), device=device)
        return mk.gather_tokens(x, masks.ids_keep), masks.mask, masks.ids_restore

    def check():
        noise = torch.rand(size.batch, size.tokens, device=device)
        kept, mask, ids_restore = published_random_masking(x, noise, size.keep)
        masks = mk.mask_from_noise(noise, size.keep)
        same(mk.gather_tokens(x, masks.ids_keep), kept)
        same(masks.mask.to(mask.dtype), mask)
        same(masks.ids_restore, ids_restore)

    def lightly():
        from lightly.models.utils import get_at_index, random_token_mask

        ratio = 1 - size.keep / size.tokens
        ids_keep, _ = random_token_mask((size.batch, size.tokens), ratio, mask_class_token=True, device=device)
        return get_at_index(x, ids_keep)

    def timm():
        from timm.layers import PatchDropout

        return PatchDropout(1 - size.keep / size.tokens, num_prefix_tokens=0)(x)

    # The mask (a byte per token at least) and ids_restore (int64) are outputs too.
    moved = 2 * size.batch * size.keep * size.dim * x.element_size() + size.batch * size.tokens * (1 + 8)
    versions = {"ours": ours, "plain": plain}
    # They draw their own masks and return less of them: their outputs are not compared.
    versions |= {version.__name__: version for version in (lightly, timm) if runs(version)}
    return Benchmark(name="mask + gather", shape=str(size), versions=versions, moved_bytes=moved, check=check)


def gather(size: Size, dtype: torch.dtype, device: str) -> Benchmark:
    x = torch.randn(size.batch, size.tokens, size.dim, device=device).to(dtype)
    pos = torch.randn(size.tokens, size.dim, device=device).to(dtype)
    cls = torch.randn(1, size.dim, device=device).to(dtype)
    ids = mk.random_mask(size.batch, size.tokens, size.keep, 0, device=device).ids_keep

    def plain():
        index = ids.unsqueeze(-1).repeat(1, 1, size.dim)
        kept = torch.gather(x + pos, 1, index)
        return torch.cat([cls.expand(size.batch, 1, -1), kept], dim=1)

    def ours():
        return mk.gather_tokens(x, ids, pos=pos, prefix=cls)

    def lightly():
        from lightly.models.utils import get_at_index

        return torch.cat([cls.expand(size.batch, 1, -1), get_at_index(x + pos, ids)], dim=1)

    moved = (2 * size.batch * size.keep + size.batch) * size.dim * x.element_size()
    return case("gather_tokens + positions + [cls]", size, ours, plain, moved, others=(lightly,))


def restore(size: Size, dtype: torch.dtype, device: str) -> Benchmark:
    x = torch.randn(size.batch, 1 + size.keep, size.dim, device=device).to(dtype)
    token = torch.randn(1, 1, size.dim, device=device).to(dtype)
    pos = torch.randn(1, 1 + size.tokens, size.dim, device=device).to(dtype)
    masks = mk.random_mask(size.batch, size.tokens, size.keep, 0, device=device)
    ids_restore, kept = masks.ids_restore, F.pad(1 + masks.ids_keep, (1, 0))

    def plain():
        mask_tokens = token.repeat(x.shape[0], ids_restore.shape[1] + 1 - x.shape[1], 1)
        patches = torch.cat([x[:, 1:, :], mask_tokens], dim=1)
        patches = torch.gather(patches, 1, ids_restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        return torch.cat([x[:, :1, :], patches], dim=1) + pos

    def ours():
        return mk.restore_tokens(x, ids_restore, token, pos, num_prefix=1)

    def lightly():
        from lightly.models.utils import repeat_token, set_at_index

        return set_at_index(repeat_token(token, (size.batch, 1 + size.tokens)), kept, x) + pos

    moved = size.batch * (size.keep + size.tokens + 2) * size.dim * x.element_size()
    return case("restore_tokens + positions", size, ours, plain, moved, others=(lightly,))


def fill(size: Size, dtype: torch.dtype, device: str) -> Benchmark:
    x = torch.randn(size.batch, size.tokens, size.dim, device=device).to(dtype)
    token = torch.randn(1, 1, size.dim, device=device).to(dtype)
    mask = mk.random_mask(size.batch, size.tokens, size.keep, 0, device=device).mask

    def plain():
        weight = mask.unsqueeze(-1).type_as(token)
        return x * (1.0 - weight) + token.expand(size.batch, size.tokens, -1) * weight

    def ours():
        return mk.fill_mask_tokens(x, mask, token)

    def lightly():
        from lightly.models.utils import mask_bool

        return mask_bool(x, mask, token)

    moved = size.batch * (size.keep + size.tokens) * size.dim * x.element_size()
    return case("fill_mask_tokens", size, ours, plain, moved, others=(lightly,))


def loss(size: Size, dtype: torch.dtype, device: str) -> Benchmark:
    images = torch.rand(size.batch, 3, size.side, size.side, device=device)
    pixels = 3 * size.patch**2
    pred = torch.randn(size.batch, size.tokens, pixels, device=device).to(dtype).requires_grad_()
    mask = mk.random_mask(size.batch, size.tokens, size.keep, 0, device=device).mask

    def plain():
        return _backward(published_loss(images, pred, mask, size.patch), pred)

    def ours():
        return _backward(mk.masked_patch_loss(pred, images, mask=mask, patch_size=size.patch, norm_pix=True), pred)

    masked = size.batch * (size.tokens - size.keep) * pixels
    # Forward and backward each read the masked predictions and pixels; the gradient is written for all patches.
    moved = 2 * masked * (pred.element_size() + 4) + pred.numel() * pred.element_size()
    return case("masked_patch_loss, forward + backward", size, ours, plain, moved)


def loss_of_masked(size: Size, dtype: torch.dtype, device: str) -> Benchmark:
    images = torch.rand(size.batch, 3, size.side, size.side, device=device)
    masks = mk.random_mask(size.batch, size.tokens, size.keep, 0, device=device)
    ids = masks.ids_masked
    pred = torch.randn(*ids.shape, 3 * size.patch**2, device=device).to(dtype).requires_grad_()

    def plain():
        target = torch.gather(patch_pixels(images, size.patch), 1, ids.unsqueeze(-1).repeat(1, 1, pred.shape[2]))
        return _backward(((pred - normalised(target)) ** 2).mean(dim=-1).mean(), pred)

    def ours():
        return _backward(mk.masked_patch_loss(pred, images, ids=ids, patch_size=size.patch, norm_pix=True), pred)

    moved = pred.numel() * (2 * (pred.element_size() + 4) + pred.element_size())
    return case("masked_patch_loss of masked patches, forward + backward", size, ours, plain, moved)


def loss_by_neighbourhood(size: Size, dtype: torch.dtype, device: str) -> Benchmark:
    if device == "cpu":
        size = replace(size, batch=min(size.batch, 4))  # of which the plain version takes seconds
    images = torch.rand(size.batch, 3, size.side, size.side, device=device)
    mask = mk.random_mask(size.batch, size.tokens, size.keep, 0, device=device).mask
    pred = torch.randn(size.batch, size.tokens, 3 * size.patch**2, device=device).to(dtype).requires_grad_()

    def plain():
        error = (pred - patch_pixels(published_norm_targets(images, 47), size.patch)) ** 2
        return _backward((error.mean(dim=-1) * mask).sum() / mask.sum(), pred)

    def ours():
        return _backward(mk.masked_patch_loss(pred, images, mask=mask, patch_size=size.patch, local_norm=47), pred)

    masked = size.batch * (size.tokens - size.keep) * pred.shape[2]
    moved = 2 * masked * (pred.element_size() + 4) + pred.numel() * pred.element_size()
    return case("masked_patch_loss, local_norm 47, forward + backward", size, ours, plain, moved, tolerance=1e-5)


def loss_of_features(size: Size, dtype: torch.dtype, device: str) -> Benchmark:
    target = torch.randn(size.batch, size.tokens, size.dim, device=device).to(dtype)
    ids = mk.random_mask(size.batch, size.tokens, size.keep, 0, device=device).ids_masked
    pred = torch.randn(*ids.shape, size.dim, device=device).to(dtype).requires_grad_()

    def plain():
        masked = torch.gather(target, 1, ids.unsqueeze(-1).expand(-1, -1, size.dim))
        return _backward(F.smooth_l1_loss(pred, F.layer_norm(masked, (size.dim,)), beta=2.0), pred)

    def ours():
        return _backward(mk.masked_feature_loss(pred, target, ids, beta=2.0), pred)

    moved = pred.numel() * (4 * pred.element_size() + pred.element_size())
    return case("masked_feature_loss, forward + backward", size, ours, plain, moved)


def embed_visible(size: Size, dtype: torch.dtype, device: str) -> Benchmark:
    images = torch.rand(size.batch, 3, size.side, size.side, device=device).to(dtype)
    conv = torch.nn.Conv2d(3, size.dim, size.patch, size.patch, device=device, dtype=dtype)
    ids = mk.random_mask(size.batch, size.tokens, size.keep, 0, device=device).ids_keep
    weight = conv.weight.detach().flatten(1)

    @torch.no_grad()
    def plain():
        tokens = conv(images).flatten(2).transpose(1, 2)
        return torch.gather(tokens, 1, ids.unsqueeze(-1).repeat(1, 1, size.dim))

    @torch.no_grad()
    def ours():
        return F.linear(mk.patchify_gather(images, ids, size.patch), weight, conv.bias)

    return case("patchify_gather + GEMM", size, ours, plain, None, tolerance=1e-4)


def patchify(size: Size, dtype: torch.dtype, device: str) -> Benchmark:
    images = torch.rand(size.batch, 3, size.side, size.side, device=device).to(dtype)
    ids = mk.random_mask(size.batch, size.tokens, size.keep, 0, device=device).ids_keep

    def plain():
        patches = patch_pixels(images, size.patch, channels_last=False)
        return torch.gather(patches, 1, ids.unsqueeze(-1).repeat(1, 1, patches.shape[2]))

    def ours():
        return mk.patchify_gather(images, ids, size.patch)

    moved = 2 * size.batch * size.keep * 3 * size.patch**2 * images.element_size()
    return case("patchify_gather", size, ours, plain, moved)


def patchify_uint8(size: Size, dtype: torch.dtype, device: str) -> Benchmark:
    images = torch.randint(256, (size.batch, 3, size.side, size.side), dtype=torch.uint8, device=device)
    ids = mk.random_mask(size.batch, size.tokens, size.keep, 0, device=device).ids_keep
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    mean_tensor = torch.tensor(mean, device=device)[:, None, None]
    std_tensor = torch.tensor(std, device=device)[:, None, None]

    def plain():
        normal = ((images.float() / 255.0 - mean_tensor) / std_tensor).to(dtype)
        patches = patch_pixels(normal, size.patch, channels_last=False)
        return torch.gather(patches, 1, ids.unsqueeze(-1).repeat(1, 1, patches.shape[2]))

    def ours():
        return mk.patchify_gather(images, ids, size.patch, mean, std, dtype=dtype)

    # Memory gives no less than a line of 64 bytes, in which rows of several patches lie side by side.
    columns = size.side // size.patch
    kept = torch.zeros(size.batch, size.tokens, dtype=torch.bool, device=device).scatter_(1, ids, True)
    pixels = kept.view(-1, columns, 1, columns, 1).expand(-1, -1, size.patch, -1, size.patch)
    lines = 3 * int(pixels.reshape(-1, 64).any(1).sum())
    element = torch.empty((), dtype=dtype).element_size()
    moved = 64 * lines + size.batch * size.keep * 3 * size.patch**2 * element
    return case("patchify_gather of uint8, normalised", size, ours, plain, moved)


def case(
    name: str,
    size: Size,
    ours: Callable,
    plain: Callable,
    moved: int | None,
    tolerance: float = 0.0,
    others: tuple[Callable, ...] = (),
) -> Benchmark:
    """A case; of `others`, versions named by the library they use, those whose library is installed are timed."""
    versions = {"ours": ours, "plain": plain} | {other.__name__: other for other in others if runs(other)}

    def check():
        expected = plain()
        for name, version in versions.items():
            if name not in ("plain", "compiled"):
                same(version(), expected, tolerance)

    return Benchmark(name=name, shape=str(size), versions=versions, moved_bytes=moved, check=check)


def same(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.0) -> None:
    eps = torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0.0
    torch.testing.assert_close(got, expected, rtol=max(tolerance, 8 * eps), atol=max(tolerance, 8 * eps))


def _backward(value: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, leaf)[0]


def published_random_masking(x: torch.Tensor, noise: torch.Tensor, keep: int) -> tuple[torch.Tensor, ...]:
    batch, tokens, dim = x.shape
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    ids_keep = ids_shuffle[:, :keep]
    kept = torch.gather(x, dim=1, index=ids_keep.unsqueeze(-1).repeat(1, 1, dim))
    mask = torch.ones([batch, tokens], device=x.device)
    mask[:, :keep] = 0
    return kept, torch.gather(mask, dim=1, index=ids_restore), ids_restore


def patch_pixels(images: torch.Tensor, patch: int, channels_last: bool = True) -> torch.Tensor:
    batch, channels, height, width = images.shape
    split = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    order = (0, 2, 4, 3, 5, 1) if channels_last else (0, 2, 4, 1, 3, 5)
    return split.permute(order).reshape(batch, (height // patch) * (width // patch), channels * patch * patch)


def normalised(target: torch.Tensor) -> torch.Tensor:
    mean = target.mean(dim=-1, keepdim=True)
    var = target.var(dim=-1, keepdim=True)
    return (target - mean) / (var + 1.0e-6) ** 0.5


def published_loss(images: torch.Tensor, pred: torch.Tensor, mask: torch.Tensor, patch: int) -> torch.Tensor:
    per_patch = ((pred - normalised(patch_pixels(images, patch))) ** 2).mean(dim=-1)
    return (per_patch * mask).sum() / mask.sum()


def published_norm_targets(images: torch.Tensor, size: int) -> torch.Tensor:
    pooled = partial(F.avg_pool2d, kernel_size=size, stride=1, padding=size // 2)
    mean = pooled(images, count_include_pad=False)
    square = pooled(images**2, count_include_pad=False)
    count = pooled(torch.ones_like(images), count_include_pad=True) * size**2
    var = torch.clamp((square - mean**2) * (count / (count - 1)), min=0.0)
    return (images - mean) / (var + 1.0e-6) ** 0.5
