"""Launches of the Triton kernels of masked_feature_loss, which are compiled ahead of time."""

from tests.launches import BF16, FP16, FP32, I64, meta


def both(op, dtype=BF16, target=BF16, dim=768, ids="image", norm=True, kind=2):
    shape = {"image": (64, 78), "flat": (1, 4992), "all": (64, 196)}[ids]
    arguments = (
        meta(*shape, dim, dtype=dtype),
        meta(64, 196, dim, dtype=target),
        None if ids == "all" else meta(*shape, dtype=I64),
        *(norm, 1e-5, kind, 2.0, True),
    )
    op.masked_feature_loss_fwd(*arguments)
    op.masked_feature_loss_bwd(meta(dtype=FP32), *arguments)


LAUNCHES = {
    "bf16": (both, {}, True),
    "fp32-flat": (both, {"dtype": FP32, "target": FP32, "ids": "flat"}, True),
    "mixed-all": (both, {"dtype": FP32, "ids": "all", "kind": 0}, False),
    "cosine": (both, {"dtype": FP16, "target": FP16, "kind": 3, "dim": 1024}, True),
    "l1-wide": (both, {"norm": False, "kind": 1, "dim": 4096}, False),
}
