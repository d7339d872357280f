"""Launches of the Triton kernels of random_mask, which are compiled ahead of time."""

import torch

from tests.launches import I64, meta


def forward(op, tokens=196, in_order=False, step=False):
    op.random_mask_fwd(7, 5, meta(dtype=I64) if step else None, 64, tokens, 49, in_order, torch.device("meta"))


LAUNCHES = {
    "plain": (forward, {}, False),
    "step-sorted-2048": (forward, {"tokens": 2048, "in_order": True, "step": True}, False),
}
