from __future__ import annotations

from mimkernels.ops._registry import ANY_FLOAT, Impl, OpSpec, register


def _fwd(x, mask, mask_token):
    return x.new_empty(x.shape)


def _bwd(grad, mask, need_x, need_mask_token):
    return (
        grad.new_empty(grad.shape if need_x else (0,)),
        grad.new_empty((grad.shape[2],) if need_mask_token else (0,)),
    )


SPEC = register(
    OpSpec(
        name="fill_mask_tokens",
        schemas={
            "fill_mask_tokens_fwd": "(Tensor x, Tensor mask, Tensor mask_token) -> Tensor",
            "fill_mask_tokens_bwd": "(Tensor grad, Tensor mask, bool need_x, bool need_mask_token) -> (Tensor, Tensor)",
        },
        fakes={"fill_mask_tokens_fwd": _fwd, "fill_mask_tokens_bwd": _bwd},
        impls=(Impl("triton"), Impl("cuda"), Impl("cpu"), Impl("reference", ANY_FLOAT)),
    )
)
