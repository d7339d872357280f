from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops import _token_mask
from mimkernels.ops._registry import Impl, OpSpec, register

NOISE = (torch.float32,)


def _fwd(noise: Tensor, keep: int, in_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _token_mask.fake(noise.shape[0], noise.shape[1], noise.device)


SPEC = register(
    OpSpec(
        name="mask_from_noise",
        schemas={"mask_from_noise_fwd": "(Tensor noise, SymInt keep, bool sorted) -> (Tensor, Tensor, Tensor)"},
        fakes={"mask_from_noise_fwd": _fwd},
        impls=(
            Impl("triton", NOISE, limits={"tokens": 2048}),
            Impl("cuda", NOISE, limits={"tokens": 8192}),
            Impl("cpu", NOISE),
            Impl("reference", (*NOISE, torch.float64)),
        ),
    )
)
