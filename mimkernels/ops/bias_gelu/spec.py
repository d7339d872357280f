from __future__ import annotations

from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._autograd import Context, Gradient, Run
from mimkernels.ops._registry import ANY_FLOAT, Impl, OpSpec, register


def _fwd(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    return x.new_empty(x.shape)


def _bwd(
    grad: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, need_x: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_x else (0,))
    if bias is None:
        return dx, x.new_empty((0,))
    return dx, bias.new_empty(bias.shape if need_bias else (0,))


def _save(ctx: Context, inputs: tuple[Tensor, Tensor | None, bool], output: Tensor) -> None:
    x, bias, tanh = inputs
    ctx.save_for_backward(x, bias)
    ctx.tanh = tanh


def _gradients(ctx: Context, bwd: Run, grad: Tensor) -> dict[str, Tensor | None]:
    x, bias = ctx.saved_tensors
    need_x, need_bias, _ = ctx.needs_input_grad
    dx, dbias = bwd(_checks.rows(grad), x, bias, ctx.tanh, need_x, need_bias)
    return {"x": dx, "bias": dbias}


SPEC = register(
    OpSpec(
        name="bias_gelu",
        schemas={
            "bias_gelu_fwd": "(Tensor x, Tensor? bias, bool tanh) -> Tensor",
            "bias_gelu_bwd": (
                "(Tensor grad, Tensor x, Tensor? bias, bool tanh, bool need_x, bool need_bias) -> (Tensor, Tensor)"
            ),
        },
        fakes={"bias_gelu_fwd": _fwd, "bias_gelu_bwd": _bwd},
        gradient=Gradient(_save, _gradients),
        impls=(Impl("triton"), Impl("cuda"), Impl("cpu"), Impl("reference", ANY_FLOAT)),
    )
)
