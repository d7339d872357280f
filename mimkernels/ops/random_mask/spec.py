from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops import _token_mask
from mimkernels.ops._registry import Impl, OpSpec, register

NOISE = (torch.float32,)


def _fwd(
    seed: int,
    offset: int,
    step: Tensor | None,
    batch: int,
    tokens: int,
    keep: int,
    in_order: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
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
