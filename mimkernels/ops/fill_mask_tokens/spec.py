from __future__ import annotations

from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._autograd import Context, Gradient, Run
from mimkernels.ops._registry import ANY_FLOAT, Impl, OpSpec, register


def _fwd(x: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _bwd(grad: Tensor, mask: Tensor, need_x: bool, need_mask_token: bool) -> tuple[Tensor, Tensor]:
    return (
        grad.new_empty(grad.shape if need_x else (0,)),
        grad.new_empty((grad.shape[2],) if need_mask_token else (0,)),
    )


def _save(ctx: Context, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gradients(ctx: Context, bwd: Run, grad: Tensor) -> dict[str, Tensor | None]:
    (mask,) = ctx.saved_tensors
    need_x, _, need_token = ctx.needs_input_grad
    dx, dtoken = bwd(_checks.rows(grad), mask, need_x, need_token)
    return {"x": dx, "mask_token": dtoken}


SPEC = register(
    OpSpec(
        name="fill_mask_tokens",
        schemas={
            "fill_mask_tokens_fwd": "(Tensor x, Tensor mask, Tensor mask_token) -> Tensor",
            "fill_mask_tokens_bwd": "(Tensor grad, Tensor mask, bool need_x, bool need_mask_token) -> (Tensor, Tensor)",
        },
        fakes={"fill_mask_tokens_fwd": _fwd, "fill_mask_tokens_bwd": _bwd},
        gradient=Gradient(_save, _gradients),
        impls=(Impl("triton"), Impl("cuda"), Impl("cpu"), Impl("reference", ANY_FLOAT)),
    )
)
