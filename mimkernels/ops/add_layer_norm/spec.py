from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._autograd import Context, Gradient, Run
from mimkernels.ops._registry import ANY_FLOAT, Impl, OpSpec, register

_Inputs = tuple[
    Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, torch.dtype
]  # of add_layer_norm_fwd


def _fwd(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    drop: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = x.shape[:2]
    return (
        x.new_empty((0,) if y is None else x.shape),
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty(statistics, dtype=torch.float32),
        x.new_empty(statistics, dtype=torch.float32),
    )


def _bwd(
    dresidual: Tensor | None,
    dnormalised: Tensor | None,
    residual: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    drop: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    y_dtype: torch.dtype,
    need_x: bool,
    need_y: bool,
    need_weight: bool,
    need_bias: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    columns = (residual.shape[2],)
    return (
        residual.new_empty(residual.shape if need_x else (0,)),
        residual.new_empty(residual.shape if need_y else (0,), dtype=y_dtype),
        residual.new_empty(columns if need_weight else (0,), dtype=torch.float32),
        residual.new_empty(columns if need_bias else (0,), dtype=torch.float32),
        residual.new_empty(columns if need_scale else (0,), dtype=torch.float32),
    )


def _save(ctx: Context, inputs: _Inputs, outputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, y, weight, _, scale, drop, *_ = inputs
    residual, _, mean, rstd = outputs
    ctx.mark_non_differentiable(mean, rstd)
    need_scale = ctx.needs_input_grad[4]  # for which alone y is kept
    ctx.save_for_backward(x if y is None else residual, y if need_scale else None, weight, scale, drop, mean, rstd)
    ctx.y_dtype = None if y is None else y.dtype
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Context, bwd: Run, dresidual: Tensor | None, dnormalised: Tensor | None, *_: Tensor | None
) -> dict[str, Tensor | None]:
    residual, y, weight, scale, drop, mean, rstd = ctx.saved_tensors
    need_x, need_y, need_weight, need_bias, need_scale, *_ = ctx.needs_input_grad
    if ctx.y_dtype is None:  # there was no sum, whose gradient comes by x itself
        dresidual = None
    # The branch's gradient is the stream's, unless it is scaled, or of another dtype.
    same = need_y and scale is None and drop is None and ctx.y_dtype == residual.dtype
    dx, dy, dweight, dbias, dscale = bwd(
        None if dresidual is None else _checks.rows(dresidual),
        None if dnormalised is None else _checks.rows(dnormalised),
        residual,
        *(y, weight, scale, drop, mean, rstd),
        ctx.y_dtype or residual.dtype,
        *(need_x or same, need_y and not same),
        # Without a gradient of the normalised rows, of which these are sums, they are zeros.
        *(need_weight and dnormalised is not None, need_bias and dnormalised is not None),
        need_scale,
    )
    return {
        "x": dx,
        "y": dx if same else dy,
        "weight": None if dnormalised is None else dweight,
        "bias": None if dnormalised is None else dbias,
        "scale": dscale,
    }


SPEC = register(
    OpSpec(
        name="add_layer_norm",
        schemas={
            # x and y [B, R, C]; weight, bias and scale [C] and drop [B], all fp32; x in the dtype that x + y has.
            # The residual (without elements where y is None), its normalised rows in out_dtype, and of every row, fp32
            # [B, R], the mean and 1 / sqrt(variance + eps).
            "add_layer_norm_fwd": "(Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? drop, "
            "float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
            # dx in the dtype of the residual (which is x where there is no y), dy in y_dtype, dweight, dbias and dscale
            # fp32. A gradient that is None is zero; y is needed for dscale alone.
            "add_layer_norm_bwd": "(Tensor? dresidual, Tensor? dnormalised, Tensor residual, Tensor? y, "
            "Tensor? weight, Tensor? scale, Tensor? drop, Tensor mean, Tensor rstd, ScalarType y_dtype, bool need_x, "
            "bool need_y, bool need_weight, bool need_bias, bool need_scale) "
            "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        },
        fakes={"add_layer_norm_fwd": _fwd, "add_layer_norm_bwd": _bwd},
        gradient=Gradient(_save, _gradients),
        impls=(Impl("triton"), Impl("cuda"), Impl("cpu"), Impl("reference", ANY_FLOAT)),
    )
)
