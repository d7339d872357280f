"""Launches of the Triton kernels of restore_tokens, which are compiled ahead of time."""

from tests.launches import BF16, FP32, I64, meta


def forward(op, dtype=BF16, batch=64, dim=512, pos=True):
    token, pos = meta(dim, dtype=dtype), meta(197, dim, dtype=dtype) if pos else None
    op.restore_tokens_fwd(meta(batch, 50, dim, dtype=dtype), meta(batch, 196, dtype=I64), token, pos, 1)


def backward(op, dtype=BF16, batch=64, dim=512, need_pos=False):
    op.restore_tokens_bwd(meta(batch, 197, dim, dtype=dtype), meta(batch, 196, dtype=I64), 49, 1, True, True, need_pos)


LAUNCHES = {
    "plain": (forward, {}, True),
    "fp32-no-pos": (forward, {"dtype": FP32, "pos": False}, True),
    "one-image": (forward, {"batch": 1}, True),
    "bwd": (backward, {}, True),
    "bwd-pos": (backward, {"need_pos": True}, True),
    "bwd-fp32": (backward, {"dtype": FP32, "need_pos": True}, True),
}
