"""Launches of the Triton kernels of weighted_pool, which are compiled ahead of time."""

from tests.launches import BF16, FP32, meta


def both(op, dtype=BF16, groups=1, normalize=True):
    x, scores = meta(64, 196, 768, dtype=dtype), meta(64, groups, 196, dtype=FP32)
    op.weighted_pool_fwd(x, scores, None, normalize, 1)
    op.weighted_pool_bwd(meta(64, groups, 768, dtype=dtype), None, x, scores, None, normalize, 1, True, True)


LAUNCHES = {
    "plain": (both, {}, True),
    "fp32-as-given": (both, {"dtype": FP32, "groups": 12, "normalize": False}, True),
}
