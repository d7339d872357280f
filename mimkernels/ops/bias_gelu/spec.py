from __future__ import annotations

from mimkernels.ops import _checks
from mimkernels.ops._autograd import Gradient
from mimkernels.ops._registry import ANY_FLOAT, Impl, OpSpec, register


def _fwd(x, bias, tanh):
    return x.new_empty(x.shape)


def _bwd(grad, x, bias, tanh, need_x, need_bias):
    dx = x.new_empty(x.shape if need_x else (0,))
    if bias is None:
        return dx, x.new_empty((0,))
    return dx, bias.new_empty(bias.shape if need_bias else (0,))


def _save(ctx, inputs, output):
    x, bias, tanh = inputs
    ctx.save_for_backward(x, bias)
    ctx.tanh = tanh


def _gradients(ctx, bwd, grad):
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
