"""A function once more, with its calls of ``scaled_dot_product_attention`` going elsewhere."""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import CellType, CodeType, FunctionType

_CALL = "scaled_dot_product_attention"
_PARAMETER = "_attention_instead"  # the free variable through which the new function calls


def calls_sdpa(function: object) -> bool:
    """Whether a Python function calls ``scaled_dot_product_attention`` in its own body."""
    return isinstance(function, FunctionType) and _mentions(function.__code__)


def rerouted(function: FunctionType, attention: Callable) -> FunctionType:
    """`function` with `attention` in place of every ``scaled_dot_product_attention``, however it is reached.

    The function is compiled again from its source, so a call costs nothing more. Globals, defaults, closure,
    ``super()``, file name and line numbers stay, for tracebacks, ``torch.compile`` and ``torch.fx``. The original is
    left as it is.

    Raises:
        OSError: its source is not available.
    """
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    definition = tree.body[0]
    definition.decorator_list = []
    definition = _Reroute().visit(definition)
    # A function around it, whose parameters are the free variables of the new one.
    outer = ast.parse(f"def outer({', '.join((*function.__code__.co_freevars, _PARAMETER))}): pass").body[0]
    outer.body = [definition]
    tree.body = [ast.fix_missing_locations(outer)]
    ast.increment_lineno(tree, first - 1)
    # Annotations stay text: they were evaluated where the function was defined.
    module = compile(tree, function.__code__.co_filename, "exec", __future__.annotations.compiler_flag, True)
    code = _code_in(_code_in(module, "outer"), function.__name__).replace(co_qualname=function.__qualname__)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells[_PARAMETER] = CellType(attention)
    closure = tuple(cells[name] for name in code.co_freevars)
    new = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    new.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(new, function)
    del new.__wrapped__  # inspect, and torch.compile through it, must see this function, not the original
    return new


class _Reroute(ast.NodeTransformer):
    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if node.attr == _CALL:
            return ast.copy_location(ast.Name(_PARAMETER, ast.Load()), node)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.copy_location(ast.Name(_PARAMETER, node.ctx), node) if node.id == _CALL else node


def _mentions(code: CodeType) -> bool:
    inner = (part for part in code.co_consts if isinstance(part, CodeType))  # lambdas, comprehensions
    return _CALL in code.co_names or any(map(_mentions, inner))


def _code_in(outer: CodeType, name: str) -> CodeType:
    return next(part for part in outer.co_consts if isinstance(part, CodeType) and part.co_name == name)
