"""Launches of the Triton kernels of add_layer_norm, which are compiled ahead of time."""

from tests.launches import BF16, FP32, meta


def both(op, stream=BF16, branch=BF16, out=BF16, width=768, rows=197, parameters=True, needs=(True,) * 5):
    x, y, normalised = (meta(64, rows, width, dtype=dtype) for dtype in (stream, branch, out))
    weight = scale = meta(width, dtype=FP32) if parameters else None
    drop = meta(64, dtype=FP32) if parameters else None
    mean = meta(64, rows, dtype=FP32)
    op.add_layer_norm_fwd(x, y, weight, weight, scale, drop, 1e-6, out)
    op.add_layer_norm_bwd(x, normalised, x, y, weight, scale, drop, mean, mean, branch, *needs)


def norm(op, width=768):
    x, weight, mean = meta(64, 197, width), meta(width, dtype=FP32), meta(64, 197, dtype=FP32)
    op.add_layer_norm_fwd(x, None, weight, weight, None, None, 1e-6, BF16)
    op.add_layer_norm_bwd(None, x, x, None, weight, None, None, mean, mean, BF16, True, False, True, True, False)


LAUNCHES = {
    "plain": (both, {}, True),
    "autocast": (both, {"stream": FP32}, True),
    "fp32": (both, {"stream": FP32, "branch": FP32, "out": FP32}, True),
    "sum": (both, {"parameters": False, "needs": (True, False, False, False, False)}, True),
    "small": (both, {"width": 192, "rows": 50}, True),
    "whole-row": (both, {"stream": FP32, "width": 4096}, True),
    "long": (both, {"width": 6144}, True),
    "odd-width": (both, {"stream": FP32, "width": 203}, False),
    "odd-whole-row": (both, {"width": 2001}, False),
    "odd-long": (both, {"width": 2501}, False),
    "norm": (norm, {}, True),
}
