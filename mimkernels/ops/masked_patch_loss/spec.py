from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._autograd import Context, Gradient, Run
from mimkernels.ops._registry import ANY_FLOAT, Impl, OpSpec, register

KINDS = ("mse", "l1", "smooth_l1")
_TARGET = (
    "Tensor pred, Tensor images, Tensor? ids, Tensor? mask, SymInt patch_t, SymInt patch_h, SymInt patch_w, "
    "Tensor? scale, Tensor? shift, bool norm_pix, int kind, float beta, bool channels_last, bool mean, "
    "int local_norm"
)

# In shared memory, with the sums of columns beside it.
LOCAL_PATCH = "elements of a patch with local_norm"
_MOST_LOCAL = {LOCAL_PATCH: 24320}


def _fwd(
    pred: Tensor,
    images: Tensor,
    ids: Tensor | None,
    mask: Tensor | None,
    pt: int,
    ph: int,
    pw: int,
    scale: Tensor | None,
    shift: Tensor | None,
    norm_pix: bool,
    kind: int,
    beta: float,
    channels_last: bool,
    mean: bool,
    local_norm: int,
) -> Tensor:
    return pred.new_empty(() if mean else pred.shape[:2], dtype=torch.float32)


def _bwd(grad: Tensor, pred: Tensor, *target: object) -> Tensor:
    return pred.new_empty(pred.shape)


def _save(
    ctx: Context,
    inputs: tuple[object, ...],
    output: Tensor,
) -> None:
    pred, images, ids, mask, pt, ph, pw, scale, shift, *options = inputs
    ctx.save_for_backward(pred, images, ids, mask, scale, shift)
    ctx.patch = (pt, ph, pw)
    ctx.options = options


def _gradients(ctx: Context, bwd: Run, grad: Tensor) -> dict[str, Tensor | None]:
    pred, images, ids, mask, scale, shift = ctx.saved_tensors
    return {"pred": bwd(_checks.rows(grad), pred, images, ids, mask, *ctx.patch, scale, shift, *ctx.options)}


SPEC = register(
    OpSpec(
        name="masked_patch_loss",
        schemas={
            "masked_patch_loss_fwd": f"({_TARGET}) -> Tensor",
            "masked_patch_loss_bwd": f"(Tensor grad, {_TARGET}) -> Tensor",
        },
        fakes={"masked_patch_loss_fwd": _fwd, "masked_patch_loss_bwd": _bwd},
        gradient=Gradient(_save, _gradients),
        impls=(Impl("triton"), Impl("cuda", limits=_MOST_LOCAL), Impl("cpu"), Impl("reference", ANY_FLOAT)),
    )
)
