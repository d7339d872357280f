from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._autograd import Context, Gradient, Run
from mimkernels.ops._registry import ANY_FLOAT, Impl, OpSpec, register

KINDS = ("mse", "l1", "smooth_l1", "cosine")
_ROWS = "Tensor pred, Tensor target, Tensor? ids, bool layer_norm, float eps, int kind, float beta, bool mean"


def _fwd(
    pred: Tensor,
    target: Tensor,
    ids: Tensor | None,
    layer_norm: bool,
    eps: float,
    kind: int,
    beta: float,
    mean: bool,
) -> Tensor:
    return pred.new_empty(() if mean else pred.shape[:2], dtype=torch.float32)


def _bwd(grad: Tensor, pred: Tensor, *others: object) -> Tensor:
    return pred.new_empty(pred.shape)


def _save(ctx: Context, inputs: tuple[object, ...], output: Tensor) -> None:
    pred, target, ids, *options = inputs
    ctx.save_for_backward(pred, target, ids)
    ctx.options = options


def _gradients(ctx: Context, bwd: Run, grad: Tensor) -> dict[str, Tensor | None]:
    return {"pred": bwd(_checks.rows(grad), *ctx.saved_tensors, *ctx.options)}


SPEC = register(
    OpSpec(
        name="masked_feature_loss",
        schemas={
            "masked_feature_loss_fwd": f"({_ROWS}) -> Tensor",
            "masked_feature_loss_bwd": f"(Tensor grad, {_ROWS}) -> Tensor",
        },
        fakes={"masked_feature_loss_fwd": _fwd, "masked_feature_loss_bwd": _bwd},
        gradient=Gradient(_save, _gradients),
        impls=(Impl("triton"), Impl("cuda"), Impl("cpu"), Impl("reference", ANY_FLOAT)),
    )
)
