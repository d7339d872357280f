"""Launches of the Triton kernels of patchify_gather, which are compiled ahead of time."""

from tests.launches import BF16, FP32, I64, U8, meta


def forward(op, images=U8, dtype=BF16, patch=(1, 16, 16), frames=1, ids=True):
    scale = meta(3, dtype=FP32)
    ids = meta(1, 64, 49, dtype=I64) if ids else None
    op.patchify_gather_fwd(meta(64, 3, frames, 224, 224, dtype=images), ids, *patch, scale, scale, dtype)


def backward(op, dtype=BF16, patch=(1, 16, 16), frames=1, ids=True):
    rows = frames // patch[0] * (224 // patch[1]) * (224 // patch[2])
    pixels = 3 * patch[0] * patch[1] * patch[2]
    grad, ids = meta(64, 49 if ids else rows, pixels, dtype=dtype), meta(1, 64, 49, dtype=I64) if ids else None
    op.patchify_gather_bwd(grad, ids, 64, 3, frames, 224, 224, *patch, meta(3, dtype=FP32), dtype)


LAUNCHES = {
    "uint8": (forward, {}, True),
    "fp32": (forward, {"images": FP32, "dtype": FP32}, True),
    "video": (forward, {"frames": 16, "patch": (2, 16, 16)}, True),
    "14-all": (forward, {"patch": (1, 14, 14), "ids": False}, False),
    "bwd": (backward, {}, True),
    "bwd-14-fp32-all": (backward, {"dtype": FP32, "patch": (1, 14, 14), "ids": False}, False),
}
