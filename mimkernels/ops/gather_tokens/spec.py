from __future__ import annotations

import math

from mimkernels.ops import _checks
from mimkernels.ops._autograd import Gradient
from mimkernels.ops._registry import ANY_FLOAT, Impl, OpSpec, register


def _fwd(x, ids, pos, prefix):
    *masks, batch, keep = ids.shape
    return x.new_empty((math.prod(masks) * batch, keep + (0 if prefix is None else prefix.shape[0]), x.shape[2]))


def _bwd(grad, ids, tokens, num_prefix, need_x, need_pos, need_prefix):
    batch, dim = ids.shape[-2], grad.shape[2]
    return (
        grad.new_empty((batch, tokens, dim) if need_x else (0,)),
        grad.new_empty((tokens, dim) if need_pos else (0,)),
        grad.new_empty((num_prefix, dim) if need_prefix else (0,)),
    )


def _save(ctx, inputs, output):
    x, ids, _, prefix = inputs
    ctx.save_for_backward(ids)
    ctx.tokens = x.shape[1]
    ctx.num_prefix = 0 if prefix is None else prefix.shape[0]


def _gradients(ctx, bwd, grad):
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
