from __future__ import annotations

from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._autograd import Context, Gradient, Run
from mimkernels.ops._registry import ANY_FLOAT, Impl, OpSpec, register


def _fwd(x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos: Tensor | None, num_prefix: int) -> Tensor:
    return x.new_empty((x.shape[0], num_prefix + ids_restore.shape[1], x.shape[2]))


def _bwd(
    grad: Tensor, ids_restore: Tensor, kept: int, num_prefix: int, need_x: bool, need_mask_token: bool, need_pos: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, dim = grad.shape
    return (
        grad.new_empty((batch, num_prefix + kept, dim) if need_x else (0,)),
        grad.new_empty((dim,) if need_mask_token else (0,)),
        grad.new_empty((length, dim) if need_pos else (0,)),
    )


def _save(ctx: Context, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:
    x, ids_restore, _, _, num_prefix = inputs
    ctx.save_for_backward(ids_restore)
    ctx.kept = x.shape[1] - num_prefix
    ctx.num_prefix = num_prefix


def _gradients(ctx: Context, bwd: Run, grad: Tensor) -> dict[str, Tensor | None]:
    (ids_restore,) = ctx.saved_tensors
    need_x, _, need_token, need_pos, _ = ctx.needs_input_grad
    dx, dtoken, dpos = bwd(_checks.rows(grad), ids_restore, ctx.kept, ctx.num_prefix, need_x, need_token, need_pos)
    return {"x": dx, "mask_token": dtoken, "pos": dpos}


SPEC = register(
    OpSpec(
        name="restore_tokens",
        schemas={
            "restore_tokens_fwd": "(Tensor x, Tensor ids_restore, Tensor mask_token, Tensor? pos, "
            "SymInt num_prefix) -> Tensor",
            "restore_tokens_bwd": "(Tensor grad, Tensor ids_restore, SymInt kept, SymInt num_prefix, bool need_x, "
            "bool need_mask_token, bool need_pos) -> (Tensor, Tensor, Tensor)",
        },
        fakes={"restore_tokens_fwd": _fwd, "restore_tokens_bwd": _bwd},
        gradient=Gradient(_save, _gradients),
        impls=(Impl("triton"), Impl("cuda"), Impl("cpu"), Impl("reference", ANY_FLOAT)),
    )
)
