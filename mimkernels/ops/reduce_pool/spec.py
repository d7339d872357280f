from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._autograd import Context, Gradient, Run
from mimkernels.ops._registry import ANY_FLOAT, Impl, OpSpec, register

KINDS = ("mean", "max", "gem")  # in the kernels their positions here


def _fwd(
    x: Tensor, mask: Tensor | None, kind: int, num_prefix: int, p: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    batch, _, dim = x.shape
    out = x.new_empty((batch, dim))
    if KINDS[kind] == "max":
        return out, x.new_empty((batch, dim), dtype=torch.int32)
    return out, x.new_empty((batch, dim) if KINDS[kind] == "gem" else (0,), dtype=torch.float32)


def _bwd(
    dout: Tensor,
    x: Tensor | None,
    saved: Tensor,
    mask: Tensor | None,
    kind: int,
    tokens: int,
    num_prefix: int,
    p: Tensor | None,
    eps: float,
    need_x: bool,
    need_p: bool,
) -> tuple[Tensor, Tensor]:
    batch, dim = dout.shape
    return (
        dout.new_empty((batch, tokens, dim) if need_x else (0,)),
        dout.new_empty((1,) if need_p else (0,), dtype=torch.float32),
    )


def _save(
    ctx: Context, inputs: tuple[Tensor, Tensor | None, int, int, Tensor | None, float], outputs: tuple[Tensor, Tensor]
) -> None:
    x, mask, kind, num_prefix, p, eps = inputs
    saved = outputs[1]
    ctx.mark_non_differentiable(saved)
    # Only the gradient of GeM looks at the tokens again.
    ctx.save_for_backward(x if p is not None else None, saved, mask, p)
    ctx.options = (kind, x.shape[1], num_prefix)
    ctx.eps = eps


def _gradients(ctx: Context, bwd: Run, dout: Tensor, _: Tensor) -> dict[str, Tensor | None]:
    x, saved, mask, p = ctx.saved_tensors
    need_x, _, _, _, need_p, _ = ctx.needs_input_grad
    dx, dp = bwd(_checks.rows(dout), x, saved, mask, *ctx.options, p, ctx.eps, need_x, need_p)
    return {"x": dx, "p": dp}


SPEC = register(
    OpSpec(
        name="reduce_pool",
        schemas={
            # The second output is what backward needs: of "max" which token it is (int32 [B, D], -1 = none), of "gem"
            # the mean of the powers (fp32 [B, D]), of "mean" nothing.
            "reduce_pool_fwd": "(Tensor x, Tensor? mask, int kind, SymInt num_prefix, Tensor? p, float eps) "
            "-> (Tensor, Tensor)",
            "reduce_pool_bwd": "(Tensor dout, Tensor? x, Tensor saved, Tensor? mask, int kind, SymInt tokens, "
            "SymInt num_prefix, Tensor? p, float eps, bool need_x, bool need_p) -> (Tensor, Tensor)",
        },
        fakes={"reduce_pool_fwd": _fwd, "reduce_pool_bwd": _bwd},
        gradient=Gradient(_save, _gradients),
        impls=(Impl("triton"), Impl("cuda"), Impl("cpu"), Impl("reference", ANY_FLOAT)),
    )
)
