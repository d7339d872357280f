"""Which block sizes the Triton attention kernels run with: a committed table, so that no user waits for a search."""

from __future__ import annotations

from typing import NamedTuple

from mimkernels.ops.attention.triton_table import TABLE

ANY = 1 << 40
DIMS = (64, 128)  # the head dim as the kernels pad it, at most
# "masked" is the forward kernel with a bias or a key mask, where those want other block sizes.
LENGTHS = {
    "forward": (64, 128, 256, ANY),
    "masked": (64, 128, 256, ANY),
    "fused": (64, 128, 256),
    "dq": (ANY,),
    "dkv": (ANY,),
    "companion": (ANY,),
}
ARCHITECTURES = (80, 90, 100)
# half: fp16 and bf16. fp32 products run without tensor cores: on every architecture alike, and so do not differ.
PRECISIONS = ("half", "tf32", "fp32")


class Config(NamedTuple):
    """Queries and keys per block, warps per program, and stages of the loop's software pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def key(
    kernel: str, arch: int, precision: str, dim: int, length: int, extra: bool
) -> tuple[str, int, str, int, int, bool] | None:
    """The table's key for a call, or None where the table leaves this kernel out.

    Args:
        kernel: of ``LENGTHS``.
        dim: the head dim as padded.
        length: keys of the forward, queries of the backward kernels.
        extra: whether row statistics are captured, or have gradients; never for a companion.
    """
    most_dim = next(most for most in DIMS if dim <= most)
    most_length = next((most for most in LENGTHS[kernel] if length <= most), None)
    if most_length is None:
        return None
    found = (kernel, arch if precision == "half" else 0, precision, most_dim, most_length, extra)
    return found if found in TABLE else None


def config(kernel: str, arch: int, precision: str, dim: int, length: int, extra: bool) -> Config | None:
    """The committed block sizes of a call, or None where the table leaves this kernel out."""
    found = key(kernel, arch, precision, dim, length, extra)
    if found is None and kernel == "masked":
        found = key("forward", arch, precision, dim, length, extra)
    return None if found is None else Config(*TABLE[found])


def beside_table(config: Config, dim: int) -> Config:
    """The block sizes of a call with a table of biases, whose look-ups take registers of the scores'."""
    warps = 8 if dim > 64 or config.block_m > 64 else config.warps
    return Config(config.block_m, min(config.block_n, 32), warps, 1)


def committed(kernel: str, arch: int, precision: str, dim: int, length: int, extra: bool) -> Config:
    """``config`` of a kernel that the table never leaves out."""
    found = config(kernel, arch, precision, dim, length, extra)
    if found is None:
        raise LookupError(f"no block sizes of {kernel} for {(arch, precision, dim, length, extra)}")
    return found
