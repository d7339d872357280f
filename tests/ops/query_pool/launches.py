"""Launches of the Triton kernels of query_pool, which are compiled ahead of time."""

from tests.launches import BF16, BOOL, FP32, meta


def forward(op, dtype=BF16, batch=64, dim=768, groups=1, width=None, sliced=False, mask=False):
    x, queries = meta(batch, 196, dim, dtype=dtype), meta(groups, dim, dtype=dtype)
    values = None if width is None else meta(batch, 196, width, dtype=dtype)
    mask = meta(batch, 196, dtype=BOOL) if mask else None
    op.query_pool_fwd(x, queries, values, mask, 0.125, 0, sliced)


def backward(op, dtype=BF16, batch=64, dim=768, groups=1, width=None, sliced=False, mask=False):
    x, queries = meta(batch, 196, dim, dtype=dtype), meta(groups, dim, dtype=dtype)
    values = None if width is None else meta(batch, 196, width, dtype=dtype)
    mask = meta(batch, 196, dtype=BOOL) if mask else None
    columns = (dim if width is None else width) // (groups if sliced else 1)
    dout, weights = meta(batch, groups, columns, dtype=dtype), meta(batch, groups, 196, dtype=FP32)
    op.query_pool_bwd(dout, weights, x, queries, values, weights, mask, 0.125, 0, sliced, True, True, True)


LAUNCHES = {
    "plain": (forward, {}, True),
    "fp32-masked": (forward, {"dtype": FP32, "mask": True}, True),
    "wide-one-image": (forward, {"dim": 1536, "batch": 1, "groups": 4}, True),
    "values": (forward, {"groups": 12, "width": 1024}, True),
    "efficient-probing": (forward, {"groups": 32, "width": 768, "sliced": True}, True),
    "odd-width": (forward, {"dim": 203, "groups": 2}, False),
    "bwd": (backward, {}, True),
    "bwd-fp32-masked": (backward, {"dtype": FP32, "mask": True, "groups": 8}, True),
    "bwd-efficient-probing": (backward, {"groups": 32, "width": 768, "sliced": True}, True),
    "bwd-sliced": (backward, {"groups": 12, "sliced": True}, True),
}
