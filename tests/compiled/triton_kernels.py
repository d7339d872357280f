"""Which Triton kernels there are, read from the sources: what is compiled ahead of time is compared with it."""

from __future__ import annotations

import ast
from pathlib import Path

import mimkernels

OPS = Path(mimkernels.__file__).parent / "ops"
ATTENTION = ("attention", "received_attention", "head_divergence")  # of tests/compiled/test_triton_attention_compile.py


def kernels(attention: bool) -> set[str]:
    """Names of the kernels of attention, or of all other ops together."""
    return {
        node.name
        for file in OPS.rglob("*.py")
        if (file.parent.name in ATTENTION) == attention
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list
    }
