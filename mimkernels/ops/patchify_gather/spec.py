from __future__ import annotations

import math

import torch
from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._autograd import Context, Gradient, Run
from mimkernels.ops._registry import ANY_FLOAT, FLOATS, Impl, OpSpec, register


def _fwd(
    images: Tensor,
    ids: Tensor | None,
    patch_t: int,
    patch_h: int,
    patch_w: int,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    batch, channels, *frames, height, width = images.shape
    rows = (math.prod(frames) // patch_t) * (height // patch_h) * (width // patch_w)
    if ids is not None:
        batch, rows = math.prod(ids.shape[:-1]), ids.shape[-1]
    return images.new_empty((batch, rows, channels * patch_t * patch_h * patch_w), dtype=dtype)


def _bwd(
    grad: Tensor,
    ids: Tensor | None,
    batch: int,
    channels: int,
    frames: int,
    height: int,
    width: int,
    patch_t: int,
    patch_h: int,
    patch_w: int,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return grad.new_empty((batch, channels, frames, height, width), dtype=dtype)


def _save(
    ctx: Context,
    inputs: tuple[Tensor, Tensor | None, int, int, int, Tensor | None, Tensor | None, torch.dtype],
    output: Tensor,
) -> None:
    images, ids, *patch, scale, _, _ = inputs
    ctx.save_for_backward(ids, scale)
    ctx.patch = patch
    ctx.image_shape = images.shape
    ctx.image_dtype = images.dtype


def _gradients(ctx: Context, bwd: Run, grad: Tensor) -> dict[str, Tensor | None]:
    ids, scale = ctx.saved_tensors
    batch, channels, *frames, height, width = ctx.image_shape
    size = (batch, channels, frames[0] if frames else 1, height, width)
    images = bwd(_checks.rows(grad), ids, *size, *ctx.patch, scale, ctx.image_dtype)
    return {"images": images.view(ctx.image_shape)}


SPEC = register(
    OpSpec(
        name="patchify_gather",
        schemas={
            "patchify_gather_fwd": "(Tensor images, Tensor? ids, SymInt patch_t, SymInt patch_h, SymInt patch_w, "
            "Tensor? scale, Tensor? shift, ScalarType dtype) -> Tensor",
            "patchify_gather_bwd": "(Tensor grad, Tensor? ids, SymInt batch, SymInt channels, SymInt frames, "
            "SymInt height, SymInt width, SymInt patch_t, SymInt patch_h, SymInt patch_w, Tensor? scale, "
            "ScalarType dtype) -> Tensor",
        },
        fakes={"patchify_gather_fwd": _fwd, "patchify_gather_bwd": _bwd},
        gradient=Gradient(_save, _gradients),
        impls=(
            Impl("triton", (*FLOATS, torch.uint8)),
            Impl("cuda", (*FLOATS, torch.uint8)),
            Impl("cpu", (*FLOATS, torch.uint8)),
            Impl("reference", (*ANY_FLOAT, torch.uint8)),
        ),
    )
)
