"""Launches of the Triton kernels of fill_mask_tokens, which are compiled ahead of time."""

from tests.launches import BF16, BOOL, FP32, meta


def both(op, dtype=BF16, dim=768):
    x, mask = meta(64, 196, dim, dtype=dtype), meta(64, 196, dtype=BOOL)
    op.fill_mask_tokens_fwd(x, mask, meta(dim, dtype=dtype))
    op.fill_mask_tokens_bwd(x, mask, True, True)
    op.fill_mask_tokens_bwd(x, mask, True, False)


LAUNCHES = {
    "plain": (both, {}, True),
    "fp32": (both, {"dtype": FP32}, True),
}
