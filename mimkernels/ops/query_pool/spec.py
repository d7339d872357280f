from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops import _checks, _pool
from mimkernels.ops._autograd import Context, Gradient, Run
from mimkernels.ops._registry import ANY_FLOAT, Impl, OpSpec, register


def _fwd(
    x: Tensor, queries: Tensor, values: Tensor | None, mask: Tensor | None, scale: float, num_prefix: int, sliced: bool
) -> tuple[Tensor, Tensor]:
    batch, tokens, dim = x.shape
    groups = queries.shape[-2]
    width = dim if values is None else values.shape[2]
    return (
        x.new_empty((batch, groups, width // groups if sliced else width)),
        x.new_empty((batch, groups, tokens), dtype=torch.float32),
    )


def _bwd(
    dout: Tensor,
    dweights: Tensor | None,
    x: Tensor,
    queries: Tensor,
    values: Tensor | None,
    weights: Tensor,
    mask: Tensor | None,
    scale: float,
    num_prefix: int,
    sliced: bool,
    need_x: bool,
    need_queries: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(queries.shape if need_queries else (0,)),
        x.new_empty(values.shape if values is not None and need_values else (0,)),
    )


def _save(
    ctx: Context,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None, float, int, bool],
    outputs: tuple[Tensor, Tensor],
) -> None:
    x, queries, values, mask, *options = inputs
    ctx.save_for_backward(x, queries, values, outputs[1], mask)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _gradients(ctx: Context, bwd: Run, dout: Tensor | None, dweights: Tensor | None) -> dict[str, Tensor | None]:
    x, queries, values, weights, mask = ctx.saved_tensors
    need_x, need_queries, need_values, *_ = ctx.needs_input_grad
    dvalues = None
    if dout is None:
        dout, values, dvalues = _pool.nothing_pooled(x if values is None else values, weights, need_values)
        need_values = False
    dout, dweights = _checks.rows(dout), None if dweights is None else _checks.rows(dweights)
    needs = (need_x, need_queries, need_values)
    dx, dqueries, of_output = bwd(dout, dweights, x, queries, values, weights, mask, *ctx.options, *needs)
    dvalues = of_output if dvalues is None else dvalues
    return {"x": dx, "queries": dqueries, "values": dvalues}


SPEC = register(
    OpSpec(
        name="query_pool",
        schemas={
            "query_pool_fwd": "(Tensor x, Tensor queries, Tensor? values, Tensor? mask, float scale, "
            "SymInt num_prefix, bool sliced) -> (Tensor, Tensor)",
            "query_pool_bwd": "(Tensor dout, Tensor? dweights, Tensor x, Tensor queries, Tensor? values, "
            "Tensor weights, Tensor? mask, float scale, SymInt num_prefix, bool sliced, bool need_x, "
            "bool need_queries, bool need_values) -> (Tensor, Tensor, Tensor)",
        },
        fakes={"query_pool_fwd": _fwd, "query_pool_bwd": _bwd},
        gradient=Gradient(_save, _gradients),
        impls=(Impl("triton"), Impl("cuda"), Impl("cpu"), Impl("reference", ANY_FLOAT)),
    )
)
