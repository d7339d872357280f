"""What this machine offers: device, precision, cores."""

import contextlib
import math
import os
from pathlib import Path
from typing import Any

import torch


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where torch has it, the CPU otherwise."""
    if name == "cuda" and not torch.cuda.is_available():
        reason = "torch was built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        raise ValueError(f"device 'cuda' is not available: {reason}; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> tuple[str, str]:
    """The precision to train in and why: ``("bf16", "the device computes it natively")``.

    A CPU without bf16 instructions emulates bf16 matrix products hundreds of times slower than fp32 ones, so ``auto``
    never picks them there.
    """
    if name == "fp16" and device.type == "cpu":
        raise ValueError("precision 'fp16' needs a GPU, the device is 'cpu'; use --precision fp32 or bf16")
    if name == "fp32":
        return "fp32", "as asked"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if name == "auto":
            return ("bf16", "native on this GPU") if native else ("fp16", "this GPU has no bf16")
        return name, "as asked" if native or name == "fp16" else "as asked, but this GPU emulates it slowly"
    native = cpu_computes_bf16()
    if name == "auto":
        return ("bf16", "native on this CPU") if native else ("fp32", "this CPU has no bf16 instructions")
    return (
        name,
        "as asked" if native else "as asked, but this CPU has no bf16 instructions: expect it to be very slow",
    )


def cpu_computes_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware (AVX-512 bf16, AMX, or Arm's bf16 extension)."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities:
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text().split()
        return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))
    return False


def default_workers(processes: int = 1) -> int:
    """Data-loading processes of each of `processes` that share the cores: they leave one to training."""
    return min(8, max(1, available_cores() // processes - 1))


def loading_workers(wanted: int | None, device: str, in_memory: bool, processes: int = 1) -> int:
    """Data-loading processes: `wanted`, or by default none where a CPU trains on images that are in memory.

    There, a worker would take a core from the training threads.
    """
    if wanted is not None:
        return wanted
    return 0 if device == "cpu" and in_memory else default_workers(processes)


def available_cores() -> int:
    """Cores this process may use: its affinity, or less where the container has a quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def set_cpu_threads() -> int:
    """Share the cores among the training processes of this machine; OMP_NUM_THREADS of a user is respected."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # torchrun sets OMP_NUM_THREADS=1 by itself when it starts several processes.
    if processes == 1 and "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    torch.set_num_threads(max(1, available_cores() // processes))
    return torch.get_num_threads()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = "CPU"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model} ({available_cores()} cores)"
