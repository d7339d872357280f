from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops._registry import ANY_FLOAT, Impl, OpSpec, register


def _fwd(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    key_mask: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], k.shape[2]), dtype=torch.float32)


SPEC = register(
    OpSpec(
        name="received_attention",
        schemas={
            "received_attention_fwd": "(Tensor q, Tensor k, Tensor lse, Tensor? bias, Tensor? bias_table, "
            "Tensor? bias_index, Tensor? key_mask, Tensor? logit_scale, float scale) -> Tensor"
        },
        fakes={"received_attention_fwd": _fwd},
        impls=(
            Impl("triton", limits={"head_dim": 128}, multiples={"head_dim": 8}),
            Impl("cuda", limits={"head_dim": 128}, multiples={"head_dim": 8}),
            Impl("cpu", limits={"head_dim": 128}, multiples={"head_dim": 8}),
            Impl("reference", ANY_FLOAT),
        ),
    )
)
