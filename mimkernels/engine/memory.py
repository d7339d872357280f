"""Allocator setting for training on CPU.

glibc serves every large tensor from a fresh memory mapping and returns it to the kernel when the tensor dies, so that
each training step pays for zeroing and mapping its pages again, activation by activation. Keeping freed memory in the
process removes these page faults. The price is that the process holds its peak for as long as it lives, which a
training process does anyway.
"""

import ctypes
import platform

# Parameter numbers of mallopt(3), from glibc's malloc.h; they are part of its ABI.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4

_TOP_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Make the C allocator keep freed memory instead of returning it to the kernel.

    Returns:
        True where it took effect (glibc), False elsewhere (musl, macOS, Windows), where nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    mallopt.restype = ctypes.c_int
    no_mappings = mallopt(_M_MMAP_MAX, 0)
    never_trim = mallopt(_M_TRIM_THRESHOLD, -1)
    grow_in_large_steps = mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)
    return bool(no_mappings and never_trim and grow_in_large_steps)
