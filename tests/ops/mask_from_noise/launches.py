"""Launches of the Triton kernels of mask_from_noise, which are compiled ahead of time."""

from tests.launches import FP32, meta


def forward(op, in_order=False):
    op.mask_from_noise_fwd(meta(64, 196, dtype=FP32), 49, in_order)


LAUNCHES = {
    "plain": (forward, {}, False),
    "sorted": (forward, {"in_order": True}, False),
}
