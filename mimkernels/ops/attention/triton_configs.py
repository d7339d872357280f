"""Block sizes of the Triton attention kernels, by architecture; ``benchmarks/tune_attention.py`` makes this table."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    block_m: int
    block_n: int
    warps: int
    stages: int


def forward(arch: int, bits: int, padded_dim: int, keys: int) -> Config:
    if bits == 32:
        return Config(32, 32, 4, 1)
    if keys <= 64:
        return Config(64, 64, 4, 1)
    if keys <= 128:
        return Config(64, 128, 4, 1)
    if keys <= 256:
        return Config(64, 256, 4, 1)
    return Config(64, 64, 4, 2)
