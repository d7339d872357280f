"""Launches of the Triton kernels of reduce_pool, which are compiled ahead of time."""

from tests.launches import BF16, BOOL, FP32, meta


def both(op, kind, dtype=BF16, mask=False, dim=768):
    x, mask, p = meta(64, 196, dim, dtype=dtype), meta(64, 196, dtype=BOOL) if mask else None, meta(1, dtype=FP32)
    saved = op.reduce_pool_fwd(x, mask, kind, 1, p, 1e-6)[1]
    op.reduce_pool_bwd(meta(64, dim, dtype=dtype), x, saved, mask, kind, 196, 1, p, 1e-6, True, kind == 2)


LAUNCHES = {
    "mean": (both, {"kind": 0}, True),
    "max-masked": (both, {"kind": 1, "mask": True}, True),
    "gem": (both, {"kind": 2}, True),
    "gem-fp32-odd-width": (both, {"kind": 2, "dtype": FP32, "dim": 203}, False),
}
