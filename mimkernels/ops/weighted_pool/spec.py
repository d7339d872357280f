from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops import _checks, _pool
from mimkernels.ops._autograd import Context, Gradient, Run
from mimkernels.ops._registry import ANY_FLOAT, Impl, OpSpec, register


def _fwd(x: Tensor, scores: Tensor, mask: Tensor | None, normalize: bool, num_prefix: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((*scores.shape[:-1], x.shape[2])), x.new_empty(scores.shape, dtype=torch.float32)


def _bwd(
    dout: Tensor,
    dweights: Tensor | None,
    x: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    normalize: bool,
    num_prefix: int,
    need_x: bool,
    need_scores: bool,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weights.shape if need_scores else (0,), dtype=torch.float32),
    )


def _save(
    ctx: Context, inputs: tuple[Tensor, Tensor, Tensor | None, bool, int], outputs: tuple[Tensor, Tensor]
) -> None:
    x, _, mask, normalize, num_prefix = inputs
    ctx.save_for_backward(x, outputs[1], mask)
    ctx.options = (normalize, num_prefix)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Context, bwd: Run, dout: Tensor | None, dweights: Tensor | None) -> dict[str, Tensor | None]:
    x, weights, mask = ctx.saved_tensors
    need_x, need_scores, *_ = ctx.needs_input_grad
    dx = None
    if dout is None:
        dout, x, dx = _pool.nothing_pooled(x, weights, need_x)
        need_x = False
    dout, dweights = _checks.rows(dout), None if dweights is None else _checks.rows(dweights)
    of_output, dscores = bwd(dout, dweights, x, weights, mask, *ctx.options, need_x, need_scores)
    dx = of_output if dx is None else dx
    return {"x": dx, "scores": dscores}


SPEC = register(
    OpSpec(
        name="weighted_pool",
        schemas={
            "weighted_pool_fwd": "(Tensor x, Tensor scores, Tensor? mask, bool normalize, SymInt num_prefix) "
            "-> (Tensor, Tensor)",
            "weighted_pool_bwd": "(Tensor dout, Tensor? dweights, Tensor x, Tensor weights, Tensor? mask, "
            "bool normalize, SymInt num_prefix, bool need_x, bool need_scores) -> (Tensor, Tensor)",
        },
        fakes={"weighted_pool_fwd": _fwd, "weighted_pool_bwd": _bwd},
        gradient=Gradient(_save, _gradients),
        impls=(Impl("triton"), Impl("cuda"), Impl("cpu"), Impl("reference", ANY_FLOAT)),
    )
)
