"""Every Triton kernel compiles ahead of time for each GPU generation, without spills, atomics or narrow accesses.

The launchers run on meta tensors of real sizes and hand over the very specialisations that a GPU would compile. That
happens in subprocesses, one per architecture, because the rest of the tests may hold an interpreting Triton.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch

from tests.compiled import triton_kernels
from tests.launches import BF16, BOOL, FP16, FP32, I64, U8, launches
from tests.once import once

ARCHITECTURES = (80, 90, 100)
# 168 registers a thread leave room for 12 warps on a multiprocessor, enough loads in flight to fill its bandwidth.
MOST_REGISTERS = 168
CASES = launches()


def compile_case(name: str, architecture: int) -> list[dict]:
    """Resources of each kernel that a case launches: registers, stack and shared bytes, PTX facts."""
    import importlib

    from mimkernels.ops import _triton

    op, launch, arguments, _ = CASES[name]
    recorded = []
    _triton.launch = lambda kernel, programs, on, *args, **options: recorded.append((kernel, args, options))
    launch(importlib.import_module(f"mimkernels.ops.{op}.triton"), **arguments)
    return [resources(*launched, architecture) for launched in recorded]


def resources(kernel, args: tuple, options: dict, architecture: int) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, *specialisation(kernel, args, options))
    launch_options = {key: value for key, value in options.items() if key in ("num_warps", "maxnreg")}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch_options)
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": kernel.__name__,
        "cubin": len(cubin),
        "registers": found["REG"],
        "stack": found["STACK"] + found["LOCAL"],
        "shared": compiled.metadata.shared,
        "wide": bool(re.search(r"(ld|st)\.global\S*\.v4\.[bfu]32|cp\.async\.cg\.[^;]*, 0x10,", ptx)),
        "atomics": bool(re.search(r"\b(atom|red)\.", ptx)),
    }


def specialisation(kernel, args: tuple, options: dict) -> tuple[dict, dict, dict]:
    """What Triton's own launcher makes of these arguments: signature, constants, known divisibility by 16."""
    names = {BF16: "bf16", FP16: "fp16", FP32: "fp32", U8: "u8", BOOL: "i1", I64: "i64", torch.int32: "i32"}
    signature, constants, attributes = {}, {}, {}
    given = iter(args)
    for index, parameter in enumerate(kernel.params):
        value = options[parameter.name] if parameter.name in options else next(given)
        whole = isinstance(value, int) and not isinstance(value, bool) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (whole and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + names[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (whole and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    assert next(given, None) is None, f"{kernel.__name__}: more arguments than parameters"
    return signature, constants, attributes


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[int, dict[str, list[dict] | str]]:
    return once(tmp_path_factory, "triton-compile", compile_all)


def compile_all() -> dict[int, dict[str, list[dict] | str]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    workers = {
        architecture: subprocess.Popen(
            [sys.executable, __file__, str(architecture)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for architecture in ARCHITECTURES
    }
    results = {}
    for architecture, worker in workers.items():
        output, errors = worker.communicate(timeout=600)
        assert worker.returncode == 0, errors
        results[architecture] = json.loads(output.splitlines()[-1])
    return results


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_within_their_resources(compiled, case, architecture):
    kernels = compiled[architecture][case]
    assert not isinstance(kernels, str), kernels
    assert kernels
    for kernel in kernels:
        assert kernel["cubin"] > 0
        assert kernel["stack"] == 0, f"spills: {kernel}"
        assert kernel["registers"] <= MOST_REGISTERS, kernel
        assert not kernel["atomics"], kernel


@pytest.mark.parametrize("case", [name for name, row in CASES.items() if row[3]])
def test_memory_bound_kernels_move_16_bytes_at_a_time(compiled, case):
    for architecture in ARCHITECTURES:
        kernels = compiled[architecture][case]
        assert any(kernel["wide"] for kernel in kernels), kernels


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_of_every_op_is_compiled(compiled, architecture):
    seen = {kernel["kernel"] for case in compiled[architecture].values() for kernel in case}
    assert seen == triton_kernels.kernels(attention=False)


def main() -> None:
    architecture, results = int(sys.argv[1]), {}
    for name in CASES:
        try:
            results[name] = compile_case(name, architecture)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(results))


if __name__ == "__main__":
    main()
