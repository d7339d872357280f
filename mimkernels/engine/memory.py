"""What becomes of memory that tensors on the CPU gave back.

glibc serves every large tensor from a fresh memory mapping and returns it to the kernel when the tensor dies, so that
each training step pays for zeroing and mapping its pages again, activation by activation. Keeping freed memory in the
process removes these page faults. The price is that the process holds its peak for as long as it lives, which a
training process does anyway.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re

__all__ = ["freed_memory", "keep_freed_memory"]

# Parameter numbers of mallopt(3), from glibc's malloc.h; they are part of its ABI.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4

_TOP_PAD_BYTES = 64 * 2**20

# Allocators that take glibc's place where they are preloaded, and keep freed memory by rules of their own.
_OTHERS = re.compile(r"jemalloc|tcmalloc|mimalloc")

_kept = False


def keep_freed_memory() -> bool:
    """Make the C allocator keep freed memory in this process instead of returning it to the system.

    For loops of your own that train or run large batches on the CPU: tensors of a step then lie where those of the step
    before lay, in pages that are there already. The commands of ``mimkernels`` call it. Call it once,
    before the first step; it holds until the process ends. The process keeps the largest amount of memory that it ever
    used, so that it does not pay where a large peak comes once and other processes need the memory. CUDA tensors, and
    small tensors, are not concerned.

    It sets three parameters of glibc's ``mallopt``: no mappings for single allocations (``M_MMAP_MAX`` = 0), nothing
    returned from the end of the heap (``M_TRIM_THRESHOLD`` = -1), and a heap that grows by 64 MiB (``M_TOP_PAD``). The
    same, without a call, by the environment that a process is started with::

        MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 MALLOC_TOP_PAD_=67108864 python train.py

    Returns:
        True where it took effect: with glibc as the allocator. False elsewhere, where nothing is changed: with musl, on
        macOS and Windows, and where jemalloc, tcmalloc or mimalloc are preloaded.
    """
    global _kept
    if _why_not() is not None:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    mallopt.restype = ctypes.c_int
    no_mappings = mallopt(_M_MMAP_MAX, 0)
    never_trim = mallopt(_M_TRIM_THRESHOLD, -1)
    grow_in_large_steps = mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)
    _kept = bool(no_mappings and never_trim and grow_in_large_steps)
    return _kept


def freed_memory() -> tuple[str, str]:
    """What happens to freed memory in this process ("kept", "returned" or "unknown"), and what to know about it."""
    reason = _why_not()
    if reason is not None:
        return "unknown", f"{reason}; mimkernels.keep_freed_memory() changes nothing"
    if _kept:
        return "kept", "by mimkernels.keep_freed_memory()"
    if os.environ.get("MALLOC_MMAP_MAX_") == "0" or "glibc.malloc.mmap_max=0" in os.environ.get("GLIBC_TUNABLES", ""):
        return "kept", "by the environment"
    return "returned", (
        "training on the CPU in a loop of your own pays for fresh pages in every step; mimkernels.keep_freed_memory() "
        "removes that (the commands of mimkernels call it)"
    )


def _why_not() -> str | None:
    """Why the allocator cannot be told to keep freed memory; None if it can."""
    if platform.libc_ver()[0] != "glibc":
        return "the C library is not glibc"
    preloaded = _OTHERS.search(os.environ.get("LD_PRELOAD", ""))
    return None if preloaded is None else f"{preloaded.group()} is preloaded"
