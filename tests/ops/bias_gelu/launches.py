"""Launches of the Triton kernels of bias_gelu, which are compiled ahead of time."""

from tests.launches import BF16, FP32, meta


def both(op, dtype=BF16, width=3072, bias=FP32, tanh=False):
    x, bias = meta(64, 196, width, dtype=dtype), None if bias is None else meta(width, dtype=bias)
    op.bias_gelu_fwd(x, bias, tanh)
    op.bias_gelu_bwd(x, x, bias, tanh, True, True)
    op.bias_gelu_bwd(x, x, bias, tanh, True, False)


LAUNCHES = {
    "plain": (both, {"bias": BF16}, True),
    "fp32-bias-tanh": (both, {"tanh": True}, True),
    "fp32": (both, {"dtype": FP32}, True),
    "odd-width-no-bias": (both, {"width": 203, "bias": None}, False),
}
