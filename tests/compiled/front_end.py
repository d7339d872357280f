"""What Triton's front end says of the kernels that the contract's cases launch: ``python -m`` prints JSON.

In a process without Triton's interpreter, which takes programs that the compiler refuses: a variable that is None
before a loop and a tensor in it, or an argument of 1, which is a constant to the compiler. Launches are noted instead
of run, and a kernel is lowered to Triton's own dialect once for each set of arguments that are None and of its flags,
which takes a tenth of compiling it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from unittest import mock

import torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from mimkernels import testing
from mimkernels.ops import _registry, _triton
from tests.cases import OPS, cases, rich
from tests.compiled.ops_aot import specialised

TARGET = GPUTarget("cuda", 90, 32)
BACKEND = make_backend(TARGET)


def lower(source: ASTSource, options: dict) -> None:
    """Raises what Triton's front end has against a kernel."""
    context = ir.context()
    ir.load_dialects(context)
    BACKEND.load_dialects(context)
    parsed = BACKEND.parse_options({**options, "arch": "sm90"})
    implementation = BACKEND.get_codegen_implementation(parsed)
    module = source.make_ir(TARGET, parsed, implementation, BACKEND.get_module_map(), context)
    assert module.verify()


def kind_of(source: ASTSource) -> tuple:
    """The kernel, its arguments that are None, and its flags."""
    places = sorted(place for place, value in source.constants.items() if value is None)
    flags = sorted((place, value) for place, value in source.constants.items() if isinstance(value, bool))
    return source.name, *places, *flags


def failures() -> tuple[dict[str, str], list[str]]:
    """What was refused, by case and kernel, and the kernels that were lowered."""
    failed: dict[str, str] = {}
    seen: set[tuple] = set()
    case, dtype = "", torch.bfloat16

    def launch(kernel, programs, on, *args, **options):
        source, compile_options = specialised(kernel, args, options)
        if (kind := (*kind_of(source), dtype)) in seen:
            return
        seen.add(kind)
        try:
            lower(source, compile_options)
        except Exception as error:
            failed[f"{case}: {source.name}"] = f"{type(error).__name__}: {error}"

    on_the_host = replace(_registry.BACKENDS["triton"], testing_devices=("cpu",))
    with mock.patch.object(_triton, "launch", launch), mock.patch.dict(_registry.BACKENDS, triton=on_the_host):
        for op in OPS:
            for one in cases(op) if "triton" in testing.backends(op) else ():
                # In fp32, whose sums keep what they have lost, the one with the most options.
                wanted = (torch.bfloat16, torch.float32) if one == rich(op) else (torch.bfloat16,)
                for dtype in [dtype for dtype in wanted if dtype in one.dtypes] or one.dtypes[:1]:
                    case = f"{one}-{str(dtype)[6:]}"
                    testing.run(one, one.inputs(dtype), "triton")
    return failed, sorted({kernel for kernel, *_ in seen})


if __name__ == "__main__":
    print(json.dumps(failures()))
