"""Launches of the Triton kernels of gather_tokens, which are compiled ahead of time."""

from tests.launches import BF16, FP16, FP32, I64, meta


def forward(op, dtype=BF16, batch=64, masks=1, dim=768, pos=True):
    ids = meta(masks, batch, 49, dtype=I64)
    pos = meta(196, dim, dtype=dtype) if pos else None
    op.gather_tokens_fwd(
        meta(batch, 196, dim, dtype=dtype), ids, pos, None if pos is None else meta(1, dim, dtype=dtype)
    )


def backward(op, dtype=BF16, batch=64, masks=1, dim=768, need_pos=False):
    ids = meta(masks, batch, 49, dtype=I64)
    op.gather_tokens_bwd(meta(masks * batch, 50, dim, dtype=dtype), ids, 196, 1, True, need_pos, need_pos)


LAUNCHES = {
    "plain": (forward, {}, True),
    "fp32-no-pos": (forward, {"dtype": FP32, "pos": False}, True),
    "fp16-small": (forward, {"dtype": FP16, "batch": 2, "dim": 192, "masks": 2}, True),
    "odd-width": (forward, {"dim": 203}, False),
    "bwd": (backward, {}, True),
    "bwd-pos-prefix": (backward, {"masks": 2, "need_pos": True}, True),
    "bwd-fp32": (backward, {"dtype": FP32, "need_pos": True}, True),
}
