"""What the machine is and can do: versions, the libraries that load, a copy and a matrix product."""

from __future__ import annotations

import torch

from benchmarks.gpu_stages.target import Target, medians, noted
from mimkernels.info import collect

_BYTES = 2**30  # of a copy, read and written together
_SIZE = 8192  # of the square matrices


def run(target: Target) -> None:
    facts = collect()
    target.add("floors", "info", facts=facts)
    if target.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        target.add(
            "floors",
            "device",
            name=properties.name,
            capability=list(torch.cuda.get_device_capability()),
            multiprocessors=properties.multi_processor_count,
            memory_gib=round(properties.total_memory / 2**30, 1),
            l2_mib=round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        )
    moved, size = (2**20, 64) if target.rehearsal else (_BYTES, _SIZE)
    with noted(target, "floors", "copy"):
        source = torch.ones(moved // 8, device=target.device)
        aim = torch.empty_like(source)
        timing = medians({"copy": [lambda: aim.copy_(source)]}, target)["copy"]
        target.add("floors", "copy", bytes=moved, tb_per_s=round(moved / timing["us"] / 1e6, 4), **timing)
    with noted(target, "floors", "gemm"):
        a, b = torch.randn(2, size, size, device=target.device).to(target.dtype)
        timing = medians({"gemm": [lambda: a @ b]}, target)["gemm"]
        target.add("floors", "gemm", size=size, tflops=round(2 * size**3 / timing["us"] / 1e6, 3), **timing)
