"""The launches of all Triton kernels but those of attention, on meta tensors of real sizes.

The launchers run, and hand over the very specialisations that a GPU would compile.
"""

from __future__ import annotations

import importlib
from unittest import mock

import torch
from triton.compiler import ASTSource

from mimkernels.ops import _triton
from tests.launches import BF16, BOOL, FP16, FP32, I64, U8
from tests.launches import launches as op_launches

ARCHITECTURES = (80, 90, 100)
CASES = op_launches()


def launches(case: str, arch: int) -> list[tuple[ASTSource, int, dict]]:
    """Source, architecture and compiler options of each kernel that a case launches."""
    op, launch, arguments, _ = CASES[case]
    found: list[tuple] = []
    note = lambda kernel, programs, on, *args, **options: found.append((kernel, args, options))  # noqa: E731
    with mock.patch.object(_triton, "launch", note):
        launch(importlib.import_module(f"mimkernels.ops.{op}.triton"), **arguments)
    return [(source, arch, options) for source, options in (specialised(*launched) for launched in found)]


def specialised(kernel, args: tuple, options: dict) -> tuple[ASTSource, dict]:
    """A launch as Triton's own launcher specialises it, and the options that are the compiler's."""
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
    compile_options = {key: value for key, value in options.items() if key in ("num_warps", "maxnreg")}
    return ASTSource(kernel, signature, constants, attributes), compile_options
