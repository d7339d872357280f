from __future__ import annotations

import math

import torch

from mimkernels.ops import _checks
from mimkernels.ops._autograd import Gradient
from mimkernels.ops._registry import ANY_FLOAT, FLOATS, Impl, OpSpec, register


def _fwd(images, ids, patch_t, patch_h, patch_w, scale, shift, dtype):
    batch, channels, *frames, height, width = images.shape
    rows = (math.prod(frames) // patch_t) * (height // patch_h) * (width // patch_w)
    if ids is not None:
        batch, rows = math.prod(ids.shape[:-1]), ids.shape[-1]
    return images.new_empty((batch, rows, channels * patch_t * patch_h * patch_w), dtype=dtype)


def _bwd(grad, ids, batch, channels, frames, height, width, patch_t, patch_h, patch_w, scale, dtype):
    return grad.new_empty((batch, channels, frames, height, width), dtype=dtype)


def _save(ctx, inputs, output):
    images, ids, *patch, scale, _, _ = inputs
    ctx.save_for_backward(ids, scale)
    ctx.patch = patch
    ctx.image_shape = images.shape
    ctx.image_dtype = images.dtype


def _gradients(ctx, bwd, grad):
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
