"""What a run computes with: the accelerator of this process, and the versions that a result may depend on."""

import os
import platform
from importlib import metadata
from typing import NamedTuple

import torch
from accelerate import Accelerator

from mimkernels._version import __version__
from mimkernels.engine.hardware import choose_device, choose_precision, set_cpu_threads
from mimkernels.engine.memory import keep_freed_memory


class Started(NamedTuple):
    """An accelerator, the precision it computes in (``fp32``, ``bf16`` or ``fp16``), and why that one."""

    accelerator: Accelerator
    precision: str
    reason: str


def start_accelerator(device: str, precision: str) -> Started:
    """Prepare this process for a run, by ``--device`` and ``--precision``.

    Raises:
        ValueError: there is no such device, or it does not compute in this precision.
    """
    chosen = choose_device(device)
    precision, reason = choose_precision(precision, chosen)
    on_cpu = chosen.type == "cpu"
    if on_cpu:
        keep_freed_memory()
        set_cpu_threads()
    _forget_earlier_run()
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="no" if precision == "fp32" else precision)
    return Started(accelerator, precision, reason)


def _forget_earlier_run() -> None:
    """accelerate keeps device and precision for the life of the process; a second run may want others."""
    if "WORLD_SIZE" not in os.environ:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


def versions() -> dict[str, str]:
    """Versions of everything that a result may depend on, by package."""
    installed = {"mimkernels": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("timm", "torchvision", "accelerate"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed
