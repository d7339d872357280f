"""Launches of the Triton kernels of upsample_cross_entropy, which are compiled ahead of time."""

from tests.launches import BF16, FP32, I64, meta


def both(op, dtype=BF16, classes=150, side=32, size=512, weighted=False, smoothing=0.0, align=False):
    logits, labels = meta(16, classes, side, side, dtype=dtype), meta(16, size, size, dtype=I64)
    options = (meta(classes, dtype=FP32) if weighted else None, 255, align, smoothing)
    op.upsample_cross_entropy_fwd(logits, labels, *options)
    statistics, totals = meta(2, 16, size, size, dtype=FP32), meta(2, dtype=FP32)
    op.upsample_cross_entropy_bwd(meta(dtype=FP32), logits, labels, statistics, totals, *options)


LAUNCHES = {
    "plain": (both, {}, False),  # neighbours in memory are pixels, whose logits are looked up one by one
    "weighted-smoothed-fp32": (both, {"dtype": FP32, "weighted": True, "smoothing": 0.1}, False),
    "aligned-odd": (both, {"classes": 19, "side": 33, "size": 129, "align": True}, False),
}
