"""Row statistics of the Triton kernel of attention: their bits, and what is written of the sums of a row."""

from __future__ import annotations

import triton
import triton.language as tl

from mimkernels.ops.attention.triton_blocks import LEAST_PATCH_MASS, LN2, power

ENTROPY = tl.constexpr(1)
PREFIX_MASS = tl.constexpr(2)
SELF_MASS = tl.constexpr(4)
DISTANCE = tl.constexpr(8)
PATCH_ENTROPY = tl.constexpr(16)
PEAK = tl.constexpr(32)
PATCH_MASS = tl.constexpr(64)
MAX_SCORE = tl.constexpr(128)
ARGMAX = tl.constexpr(256)
# Statistics that need sums over patch keys and over prefix keys apart, those that need the mean score, and those that
# are there without any statistic.
SPLITTING = tl.constexpr(2 | 16 | 64)
EXPECTING = tl.constexpr(1 | 16)
OF_MAXIMUM = tl.constexpr(32 | 128)


@triton.constexpr_function
def asked(stats, statistics):
    return (stats & statistics) != 0


@triton.jit
def store_statistics(
    target,
    plane,
    rows,
    some,
    num_prefix,
    factor,
    unit_score,
    level,
    total,
    log_total,
    inverse,
    mass,
    mass_prefix,
    energy,
    energy_prefix,
    far,
    own,
    at_top,
    STATS: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # From what attend_block summed, one plane after the other in the order of the bits; unit_score is the score of a
    # level of 1.
    empty = total == 0.0
    unit: tl.constexpr = 1.0 if EXACT else LN2  # of t
    if asked(STATS, ENTROPY):
        both = energy
        if HAS_PREFIX and asked(STATS, SPLITTING):
            both = energy + energy_prefix
        entropy = tl.where(empty, 0.0, log_total - both * inverse * unit)
        tl.store(target, entropy, mask=some)
        target += plane
    if asked(STATS, PREFIX_MASS):
        if HAS_PREFIX:
            tl.store(target, mass_prefix * inverse, mask=some)
        else:
            tl.store(target, tl.zeros([BLOCK_M], dtype=tl.float32), mask=some)
        target += plane
    if asked(STATS, SELF_MASS):
        p = tl.where(empty, 0.0, power((own - level) * factor, EXACT) * inverse)
        tl.store(target, p, mask=some)
        target += plane
    if asked(STATS, DISTANCE):
        if HAS_PREFIX:
            far = tl.where(rows >= num_prefix, far, 0.0)
        tl.store(target, far * inverse, mask=some)
        target += plane
    if asked(STATS, PATCH_ENTROPY):
        no_mass = mass * inverse < LEAST_PATCH_MASS  # false for NaN, which goes on
        safe = tl.where(no_mass, 1.0, mass)
        tl.store(target, tl.where(no_mass, 0.0, tl.log2(safe) * LN2 - energy / safe * unit), mask=some)
        target += plane
    if asked(STATS, PEAK):
        tl.store(target, inverse, mask=some)
        target += plane
    if asked(STATS, PATCH_MASS):
        tl.store(target, mass * inverse, mask=some)
        target += plane
    # A maximum may pass NaN over, the sum does not; nor infinity.
    ordered = (total == total) | (level == float("inf"))
    if asked(STATS, MAX_SCORE):
        tl.store(target, tl.where(ordered, level * unit_score, total), mask=some)
        target += plane
    if asked(STATS, ARGMAX):
        tl.store(target, tl.where(ordered & (total != 0.0), at_top.to(tl.float32), -1.0), mask=some)
