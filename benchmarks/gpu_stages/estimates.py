"""What reading and disassembly let expect of an H200 in bf16; a run says which of it was wrong.

Microseconds at B = 256, H = 12, D = 64, give or take a quarter. Nothing here was measured.
"""

from __future__ import annotations

from typing import NamedTuple


class Estimate(NamedTuple):
    """(Stage, kind, tokens, version) of a line, and the range that its ``us`` was expected in."""

    stage: str
    kind: str
    tokens: int
    version: str
    low: float
    high: float


_TRITON = "triton, bare"

ESTIMATES = (
    Estimate("attention", "forward", 50, "bare", 20, 20),
    Estimate("attention", "forward", 197, "bare", 90, 90),
    Estimate("attention", "forward", 577, "bare", 660, 660),
    Estimate("attention", "forward", 197, "all statistics", 110, 110),
    Estimate("attention", "forward", 50, "bare, one-strip", 22, 27),
    Estimate("attention", "forward", 197, "bare, one-strip", 120, 150),
    Estimate("attention", "forward", 577, "bare, one-strip", 1000, 1150),
    Estimate("attention", "forward", 197, "all statistics, one-strip", 250, 350),
    Estimate("attention", "forward", 50, "flash", 43, 43),
    Estimate("attention", "forward", 197, "flash", 183, 183),
    Estimate("attention", "forward", 577, "flash", 1050, 1050),
    Estimate("attention", "forward", 50, "cudnn", 35, 45),
    Estimate("attention", "forward", 197, "cudnn", 154, 154),
    Estimate("attention", "forward", 577, "cudnn", 815, 860),
    Estimate("triton", "forward", 50, _TRITON, 20, 24),
    Estimate("triton", "forward", 197, _TRITON, 150, 190),
    Estimate("triton", "forward", 577, _TRITON, 1000, 1000),
)
TOLERANCE = 0.25

# Milliseconds of a step of MAE with ViT-B, B = 256, bf16, give or take a fifth.
STEPS = {"plain": 52.0, "compiled": 44.0, "ours": 46.5, "ours, compiled": 39.5}
STEP_TOLERANCE = 0.2
