from __future__ import annotations

import torch

from mimkernels.ops._registry import ANY_FLOAT, Impl, OpSpec, register

KINDS = ("mse", "l1", "smooth_l1")
_TARGET = (
    "Tensor pred, Tensor images, Tensor? ids, Tensor? mask, SymInt patch_t, SymInt patch_h, SymInt patch_w, "
    "Tensor? scale, Tensor? shift, bool norm_pix, int kind, float beta, bool channels_last, bool mean"
)


def _fwd(pred, images, ids, mask, pt, ph, pw, scale, shift, norm_pix, kind, beta, channels_last, mean):
    return pred.new_empty(() if mean else pred.shape[:2], dtype=torch.float32)


def _bwd(grad, pred, *target):
    return pred.new_empty(pred.shape)


SPEC = register(
    OpSpec(
        name="masked_patch_loss",
        schemas={
            "masked_patch_loss_fwd": f"({_TARGET}) -> Tensor",
            "masked_patch_loss_bwd": f"(Tensor grad, {_TARGET}) -> Tensor",
        },
        fakes={"masked_patch_loss_fwd": _fwd, "masked_patch_loss_bwd": _bwd},
        impls=(Impl("triton"), Impl("cuda"), Impl("cpu"), Impl("reference", ANY_FLOAT)),
    )
)
