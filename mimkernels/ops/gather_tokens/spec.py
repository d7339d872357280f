from __future__ import annotations

import math

from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._autograd import Context, Gradient, Run
from mimkernels.ops._registry import ANY_FLOAT, Impl, OpSpec, register


def _fwd(x: Tensor, ids: Tensor, pos: Tensor | None, prefix: Tensor | None) -> Tensor:
    *masks, batch, keep = ids.shape
    return x.new_empty((math.prod(masks) * batch, keep + (0 if prefix is None else prefix.shape[0]), x.shape[2]))


def _bwd(
    grad: Tensor, ids: Tensor, tokens: int, num_prefix: int, need_x: bool, need_pos: bool, need_prefix: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, dim = ids.shape[-2], grad.shape[2]
    return (
        grad.new_empty((batch, tokens, dim) if need_x else (0,)),
        grad.new_empty((tokens, dim) if need_pos else (0,)),
        grad.new_empty((num_prefix, dim) if need_prefix else (0,)),
    )


def _save(ctx: Context, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None], output: Tensor) -> None:
    x, ids, _, prefix = inputs
    ctx.save_for_backward(ids)
    ctx.tokens = x.shape[1]
    ctx.num_prefix = 0 if prefix is None else prefix.shape[0]


def _gradients(ctx: Context, bwd: Run, grad: Tensor) -> dict[str, Tensor | None]:
    (ids,) = ctx.saved_tensors
    need_x, _, need_pos, need_prefix = ctx.needs_input_grad
    dx, dpos, dprefix = bwd(_checks.rows(grad), ids, ctx.tokens, ctx.num_prefix, need_x, need_pos, need_prefix)
    return {"x": dx, "pos": dpos, "prefix": dprefix}


SPEC = register(
    OpSpec(
        name="gather_tokens",
        schemas={
            "gather_tokens_fwd": "(Tensor x, Tensor ids, Tensor? pos, Tensor? prefix) -> Tensor",
            "gather_tokens_bwd": "(Tensor grad, Tensor ids, SymInt tokens, SymInt num_prefix, bool need_x, "
            "bool need_pos, bool need_prefix) -> (Tensor, Tensor, Tensor)",
        },
        fakes={"gather_tokens_fwd": _fwd, "gather_tokens_bwd": _bwd},
        gradient=Gradient(_save, _gradients),
        impls=(Impl("triton"), Impl("cuda"), Impl("cpu"), Impl("reference", ANY_FLOAT)),
    )
)
