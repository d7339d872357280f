"""Compiles the launches of the Triton attention kernels for GPUs that need not be there, and says what they take.

A process of its own (``python tests/compiled/attention_aot.py < launches``), because the interpreter in which other
tests run Triton replaces its compiler process-wide. Reads one launch per line as JSON, writes one line of JSON for
each. What was compiled stays in Triton's cache, so that the next run takes seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mimkernels.ops import _triton
from mimkernels.ops.attention import triton_configs

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.int64: "i64", torch.bool: "i1"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ALL_STATISTICS = 127


@contextlib.contextmanager
def recorded_launches(arch: int, module: object) -> Iterator[list]:
    """Launches are noted instead of run, with the block sizes of the given architecture."""
    found: list[tuple] = []
    before = _triton.launch, module.architecture
    _triton.launch = lambda kernel, programs, on, *args, **options: found.append((kernel, args, options))
    module.architecture = lambda device: arch
    try:
        yield found
    finally:
        _triton.launch, module.architecture = before


def launches(kernel: str, arch: int, precision: str, dim: int, length: int, extra: bool) -> list[tuple]:
    """What the launchers run for one entry of the table: views of a packed projection, one prefix token."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    dtype = torch.float16 if precision == "half" else torch.float32
    tokens = min(length, 1025)
    q, k, v = torch.empty(1, tokens, 3, 2, dim, dtype=dtype).permute(2, 0, 3, 1, 4)
    out, lse = torch.empty(1, tokens, 2, dim, dtype=dtype), torch.empty(1, 2, tokens)
    scale = dim**-0.5
    positions = torch.empty(1, tokens, 2) if extra else None
    if kernel == "companion":
        found = []
        for op in ("received_attention", "head_divergence"):
            module = importlib.import_module(f"mimkernels.ops.{op}.triton")
            with recorded_launches(arch, module) as some:
                getattr(module, f"{op}_fwd")(q, k, lse, *[None] * 5, scale)
            found += some[:2]
        return found
    module = importlib.import_module("mimkernels.ops.attention.triton")
    if kernel == "coef":
        rows = torch.empty(7, 1, 2, tokens)
        with recorded_launches(arch, module) as found:
            importlib.import_module("mimkernels.ops.attention.triton_coef").attention_coef(
                lse, rows, rows, ALL_STATISTICS
            )
        return found
    if kernel == "windows":  # Swin V2's cosine attention beside a shift mask and a table, forward and backward
        given = (torch.empty(1, 1, tokens, tokens), torch.empty(99, 2), torch.zeros(tokens, tokens, dtype=torch.int64))
        with recorded_launches(arch, module) as found:
            module.attention_fwd(
                *(q, k, v, *given, None, lse[0, :, 0], 1.0, 1, positions, ALL_STATISTICS if extra else 0)
            )
            needs = (False, True, True, False)
            module.attention_bwd(out, q, k, v, out, *(lse, lse, *given, None, lse[0, :, 0], 1.0, 1, None, None, *needs))
        return [launch for launch in found if launch[0].__name__ != "sum_partials_kernel"]
    if kernel == "dbias":  # of a bias that the heads share
        bias, coef = torch.empty(1, 1, tokens, tokens, dtype=dtype), torch.empty(6, 1, 2, tokens)
        with recorded_launches(arch, module) as found:
            module.attention_bwd(
                out, q, k, v, out, *(lse, lse, bias, *[None] * 4, scale, 1, positions, coef, True, *[False] * 3)
            )
        return found[-1:]
    with recorded_launches(arch, module) as found:
        if kernel in ("forward", "masked"):
            bias = torch.empty(1, 2, tokens, tokens, dtype=dtype) if kernel == "masked" else None
            key_mask = torch.empty(1, tokens, dtype=torch.bool) if kernel == "masked" else None
            module.attention_fwd(
                *(q, k, v, bias, None, None, key_mask, None, scale, 1, positions, ALL_STATISTICS if extra else 0)
            )
        else:
            coef = torch.empty(6, 1, 2, tokens) if extra else None
            module.attention_bwd(out, q, k, v, out, *(lse, lse, *[None] * 5, scale, 1, positions, coef, *[False] * 4))
    forward = "attention_fwd_kernel"
    name = {"forward": forward, "masked": forward, "fused": "attention_bwd_kernel"}.get(
        kernel, f"attention_{kernel}_kernel"
    )
    return [launch for launch in found if launch[0].__name__ == name]


def resources(launch: tuple, arch: int) -> dict:
    """Registers per thread, bytes spilled per thread, and shared memory in bytes of one launch, compiled."""
    kernel, args, options = launch
    options = dict(options)
    compile_options = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    signature, constants, attributes = {}, {}, {}
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    for index, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):  # aligned, as torch allocates
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=compile_options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", file.name], text=True)
    return {
        "kernel": kernel.__name__,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": made.metadata.shared,
    }


def main() -> None:
    for line in sys.stdin:
        entry = json.loads(line)
        kernel, arch, precision, dim, length, extra = entry
        for launch in launches(kernel, arch, precision, dim, length or triton_configs.ANY, extra):
            print(json.dumps({"entry": entry, **resources(launch, arch)}), flush=True)


if __name__ == "__main__":
    main()
