"""Launches of Triton kernels on meta tensors, collected from ``tests/ops/<op>/launches.py``.

An op's ``LAUNCHES`` has by label: a function that takes ``mimkernels/ops/<op>/triton.py``, its other arguments, and
whether accesses of 16 bytes are possible. Attention and its companions have
tests/compiled/test_triton_attention_compile.py.
"""

from __future__ import annotations

import torch

from tests.cases import ops_with, part_of

BF16, FP16, FP32, U8, BOOL, I64 = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.uint8,
    torch.bool,
    torch.int64,
)


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches() -> dict[str, tuple]:
    """(Op, function, arguments, whether 16-byte accesses are possible) of every launch, by ``<op>-<label>``."""
    return {
        f"{op}-{label}": (op, *launch)
        for op in ops_with("launches")
        for label, launch in part_of(op, "launches").LAUNCHES.items()
    }
