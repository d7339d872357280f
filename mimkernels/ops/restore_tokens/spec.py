from __future__ import annotations

from mimkernels.ops._registry import ANY_FLOAT, Impl, OpSpec, register


def _fwd(x, ids_restore, mask_token, pos, num_prefix):
    return x.new_empty((x.shape[0], num_prefix + ids_restore.shape[1], x.shape[2]))


def _bwd(grad, ids_restore, kept, num_prefix, need_x, need_mask_token, need_pos):
    batch, length, dim = grad.shape
    return (
        grad.new_empty((batch, num_prefix + kept, dim) if need_x else (0,)),
        grad.new_empty((dim,) if need_mask_token else (0,)),
        grad.new_empty((length, dim) if need_pos else (0,)),
    )


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
        impls=(Impl("triton"), Impl("cuda"), Impl("cpu"), Impl("reference", ANY_FLOAT)),
    )
)
