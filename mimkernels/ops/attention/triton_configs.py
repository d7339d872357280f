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


def backward(arch: int, bits: int, padded_dim: int, queries: int) -> tuple[Config | None, Config, Config]:
    if bits == 32:
        return None, Config(32, 32, 4, 1), Config(32, 32, 4, 1)
    fused = None
    if queries <= 64:
        fused = Config(64, 64, 4, 1)
    elif queries <= 128:
        fused = Config(128, 64, 8, 1)
    return fused, Config(64, 64, 4, 2), Config(64, 64, 4, 2)


def companion(bits: int) -> Config:
    """received_attention and head_divergence."""
    return Config(32, 32, 4, 1) if bits == 32 else Config(64, 64, 4, 2)
