"""Which GPUs the kernels run on: what a device must be, what the CUDA library was built for, what the driver serves."""

from __future__ import annotations

import ctypes
import re

import torch

from mimkernels.ops import _native

# csrc/cuda copies asynchronously and multiplies bf16 and TF32 on tensor cores; Triton supports nothing older either.
OLDEST = (8, 0)


def refusal(backend: str, index: int | None, named: bool) -> str | None:
    """Why a backend does not run on a CUDA device; None if it does, and where no device is visible.

    Args:
        backend: a name of ``mimkernels info``; those without kernels for GPUs run everywhere.
        index: of the device; None is the current one.
        named: whether the call names the backend.
    """
    if backend not in ("triton", "cuda") or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(index)
    # What Triton compiles for older devices was never tried: by name only.
    if capability < OLDEST and (backend == "cuda" or not named):
        return f"needs compute capability {_dotted(OLDEST)} or later, this device has {_dotted(capability)}"
    if backend == "triton":
        return None
    build = _native.library("cuda").build
    architectures = str(build.get("cuda_architectures", ""))
    if code_for(architectures, capability) is None:
        return f"was built for {architectures} alone, this device has compute capability {_dotted(capability)}"
    toolkit, driver = _numbers(str(build.get("nvcc", ""))), driver_version()
    if toolkit and driver and driver[0] < toolkit[0]:
        return (
            f"was built by nvcc {_dotted(toolkit[:2])}, which needs a driver for CUDA {toolkit[0]} or later; "
            f"this driver is for CUDA {_dotted(driver)} (update it, or build by nvcc {driver[0]}.x)"
        )
    return None


# As torch.compiler.assume_constant_result does it, which would import torch.compile with this package.
refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def code_for(architectures: str, capability: tuple[int, int]) -> str | None:
    """What a library has for a device: ``"machine code"``, ``"PTX"``, which the driver compiles, or None.

    Args:
        architectures: the targets in CMake's notation, such as ``"80 90a-real 100"``; machine code is taken for granted
            where one is a word ("native", "all"), and where there are none.
        capability: of the device.
    """
    found = []
    for target in architectures.split():
        parts = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", target)
        if parts is None:
            return "machine code"
        of, feature = (int(parts[1]), int(parts[2])), parts[3]
        serves = of == capability if feature == "a" else of[0] == capability[0] and of <= capability
        if parts[4] != "-virtual" and serves:
            return "machine code"
        if parts[4] != "-real" and (serves if feature else of <= capability):
            found.append("PTX")
    return found[0] if found else None if architectures.split() else "machine code"


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver serves, such as (12, 8); None without a driver."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
