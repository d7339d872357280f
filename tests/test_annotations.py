"""What mypy is told to leave out: modules of Triton kernels, whose other functions are annotated all the same."""

import ast
from pathlib import Path

import pytest

import mimkernels

OPS = Path(mimkernels.__file__).parent / "ops"
MODULES = sorted(path for path in OPS.rglob("*.py") if "import triton" in path.read_text())


def missing(function: ast.FunctionDef) -> list[str]:
    """Names of the arguments without an annotation, and "return"."""
    of = function.args
    arguments = [*of.posonlyargs, *of.args, *of.kwonlyargs, *filter(None, (of.vararg, of.kwarg))]
    return [arg.arg for arg in arguments if arg.annotation is None] + ["return"] * (function.returns is None)


def test_missing_annotations_are_seen():
    function = ast.parse("def f(a, b: int, *c, d: int = 0, **e: int): ...").body[0]
    assert missing(function) == ["a", "c", "return"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(OPS)))
def test_all_but_kernels_are_annotated(path):
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    plain = [node for node in functions if not any("triton" in ast.unparse(mark) for mark in node.decorator_list)]
    assert {node.name: missing(node) for node in plain if missing(node)} == {}
