"""Launches of the Triton kernels of masked_patch_loss, which are compiled ahead of time."""

from tests.launches import BF16, BOOL, FP16, FP32, I64, U8, meta


def both(op, images=U8, dtype=BF16, side=16, ids=True, norm=True, kind=0, channels_last=True, cells=0, box=0):
    rows = 147 if ids else 196
    pixels, scale = 3 * side * side, meta(3, dtype=FP32) if images == U8 else None
    ids, mask = (meta(64, rows, dtype=I64), None) if ids else (None, meta(64, rows, dtype=BOOL))
    if cells:
        mask = meta(64, 14 * cells, 14 * cells, dtype=BOOL)
    target = (meta(64, 3, 1, 14 * side, 14 * side, dtype=images), ids, mask, 1, side, side, scale, scale)
    arguments = (meta(64, rows, pixels, dtype=dtype), *target, norm, kind, 1.0, channels_last, True, box)
    op.masked_patch_loss_fwd(*arguments)
    op.masked_patch_loss_bwd(meta(dtype=FP32), *arguments)


LAUNCHES = {
    "uint8-ids": (both, {}, True),
    "fp32-mask-l1": (
        both,
        {"images": FP32, "dtype": FP32, "ids": False, "norm": False, "kind": 1, "channels_last": False},
        True,
    ),
    "bf16-14": (both, {"images": BF16, "side": 14, "ids": False, "kind": 2}, False),
    "32": (both, {"side": 32, "images": FP16, "dtype": FP16}, True),
    "cells": (
        both,
        {"images": FP32, "dtype": FP32, "side": 32, "ids": False, "norm": False, "kind": 1, "cells": 8},
        True,
    ),
    "local-norm": (both, {"norm": False, "box": 47}, False),
    "local-norm-cells": (both, {"images": BF16, "side": 32, "ids": False, "norm": False, "cells": 4, "box": 47}, False),
    "chunked": (both, {"side": 48, "ids": False}, True),
}
