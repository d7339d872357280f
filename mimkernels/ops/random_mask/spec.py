from __future__ import annotations

import torch

from mimkernels.ops import _token_mask
from mimkernels.ops._registry import Impl, OpSpec, register

NOISE = (torch.float32,)


def _fwd(seed, offset, step, batch, tokens, keep, in_order, device):
    return _token_mask.fake(batch, tokens, device)


SPEC = register(
    OpSpec(
        name="random_mask",
        schemas={
            "random_mask_fwd": "(int seed, SymInt offset, Tensor? step, SymInt batch, SymInt tokens, SymInt keep, "
            "bool sorted, Device device) -> (Tensor, Tensor, Tensor)"
        },
        fakes={"random_mask_fwd": _fwd},
        impls=(
            Impl("triton", NOISE, limits={"tokens": 2048}),
            Impl("cuda", NOISE, limits={"tokens": 8192}),
            Impl("cpu", NOISE),
            Impl("reference", NOISE),
        ),
    )
)
