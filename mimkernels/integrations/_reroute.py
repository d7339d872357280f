"""Rewriting: a function compiled again from its source, its calls of PyTorch's SDPA going to another function.

For ``accelerate`` and transformers, whose models shall compute faster for good: modules of many classes that differ in
everything but that call. A rewritten forward costs nothing per call, is compiled by ``torch.compile`` in one graph, and
works on every thread and in copies. The two other ways would not do. A function mode (``mimkernels.heads.intercept``)
costs a look at every function that is called, breaks graphs, and ends with its block. A change of class to a forward
written by us (``mimkernels.nn._classes``) would need one forward for each of timm's families, kept up with timm's; it
is used where more than the call changes. Putting a function into ``torch.nn.functional`` would change attention of
everybody in the process.

The class that gets a rewritten forward is made by ``mimkernels.integrations.timm``, a subclass of the module's own.
"""

from __future__ import annotations
import __future__

import ast
import dis
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from itertools import zip_longest
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, cast

from torch import nn

from mimkernels.nn.sdpa import TORCH_SDPA

_CALL = "scaled_dot_product_attention"
_PARAMETER = "_attention_instead"  # the free variable through which the new function calls
_NO_CLASS = "_____"  # around functions that are no methods: names in a class of underscores are not mangled


def calls_sdpa(function: object, module: nn.Module | None = None) -> bool:
    """Whether a Python function names PyTorch's ``scaled_dot_product_attention`` in its own body.

    What a name means counts, not how it reads: a function, method or attribute of the user's own that is called so is
    none. Where the source is not available, the name alone decides.

    Args:
        module: the function's first argument, through whose attributes names are followed, too.
    """
    if not isinstance(function, FunctionType) or not _mentions(function, function.__code__):
        return False
    if _PARAMETER in function.__code__.co_freevars:  # made by `rerouted`
        return False
    try:
        definition = _definition(function)
    except (OSError, ValueError):
        return True
    names = _Names(function, definition, module)
    return any(names.value(node) is TORCH_SDPA for node in names.candidates())


def rerouted(function: FunctionType, attention: Callable) -> FunctionType:
    """`function` with `attention` in place of PyTorch's ``scaled_dot_product_attention``, however it is reached.

    Whether it is PyTorch's is asked when the function runs, so that whoever replaces it later gets what they want. The
    function is compiled again from its source. Globals, defaults, closure, ``super()``, private names, file name and
    line numbers stay, for tracebacks, ``torch.compile`` and ``torch.fx``. The original is left as it is.

    Raises:
        OSError: its source is not available.
        ValueError: its source, compiled again, is not what it runs; as with decorators that rewrite it.
    """
    definition = _definition(function)
    if not _same_code(_compiled(definition, function), function.__code__):
        raise ValueError("its source, compiled again, is not what it runs")
    names = _Names(function, definition)
    changed = cast(ast.FunctionDef, _Reroute(set(map(id, names.candidates()))).visit(definition))
    code = _compiled(changed, function)
    _definition.cache_clear()  # what was changed is of no use to others

    def instead(value: Any) -> Any:
        return attention if value is TORCH_SDPA else value

    cells = {**_cells(function), _PARAMETER: CellType(instead)}
    closure = tuple(cells[name] for name in code.co_freevars)
    new = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    new.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(new, function)
    del new.__dict__["__wrapped__"]  # inspect, and torch.compile through it, must see this function, not the original
    return new


class _Names:
    """What names in a function's own body stand for."""

    def __init__(self, function: FunctionType, definition: ast.FunctionDef, module: nn.Module | None = None) -> None:
        code = function.__code__
        self._definition = definition
        self._module = module
        self._known: dict[str, Any] = dict(function.__globals__)
        self._known.update(_contents(function))
        self._known.update(dict.fromkeys((*code.co_varnames, *code.co_cellvars)))
        self._known.update(_imports(definition))
        if code.co_argcount:
            self._known[code.co_varnames[0]] = module

    def candidates(self) -> Iterator[ast.expr]:
        """The expressions whose value may be PyTorch's function."""
        for node in ast.walk(self._definition):
            if isinstance(getattr(node, "ctx", None), ast.Load) and (
                (isinstance(node, ast.Attribute) and node.attr == _CALL)
                or (isinstance(node, ast.Name) and (node.id == _CALL or self._known.get(node.id) is TORCH_SDPA))
            ):
                yield node

    def value(self, node: ast.expr) -> Any:
        """What an expression stands for before the function runs, or None."""
        if isinstance(node, ast.Name):
            return self._known.get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        owner = self.value(node.value)
        if isinstance(owner, ModuleType):
            return getattr(owner, node.attr, None)
        return None if owner is None else inspect.getattr_static(owner, node.attr, None)


class _Reroute(ast.NodeTransformer):
    """Lets the values of the given expressions pass through ``_PARAMETER``."""

    def __init__(self, nodes: set[int]) -> None:
        self._nodes = nodes

    def visit(self, node: ast.AST) -> ast.AST:
        chosen = id(node) in self._nodes
        node = self.generic_visit(node)
        if not chosen or not isinstance(node, ast.expr):
            return node
        return ast.copy_location(ast.Call(ast.copy_location(ast.Name(_PARAMETER, ast.Load()), node), [node], []), node)


def _mentions(function: FunctionType, code: CodeType) -> bool:
    names = {*code.co_names, *code.co_freevars}
    known = (function.__globals__.get(name) is TORCH_SDPA for name in names)
    inner = (part for part in code.co_consts if isinstance(part, CodeType))  # lambdas, comprehensions
    return (
        _CALL in names
        or any(known)
        or any(value is TORCH_SDPA for value in _contents(function).values())
        or any(_mentions(function, part) for part in inner)
    )


def _cells(function: FunctionType) -> dict[str, CellType]:
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))


def _contents(function: FunctionType) -> dict[str, Any]:
    """Values of the free variables that have one."""
    values = {}
    for name, cell in _cells(function).items():
        try:
            values[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            values[name] = None
    return values


def _imports(definition: ast.FunctionDef) -> dict[str, Any]:
    """What the function's own import statements give, of modules that are there."""
    imported: dict[str, Any] = {}
    for node in ast.walk(definition):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                imported[alias.asname or name] = sys.modules.get(name)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                imported[alias.asname or alias.name] = getattr(sys.modules.get(node.module or ""), alias.name, None)
    return imported


@functools.lru_cache(16)
def _definition(function: FunctionType) -> ast.FunctionDef:
    """The function's source without decorators, defaults and annotations: they were evaluated where it was defined."""
    lines, first = inspect.getsourcelines(function)
    indented = lines[0][:1].isspace()
    try:
        tree = ast.parse("".join(["if True:\n", *lines] if indented else lines))
    except SyntaxError as error:
        raise ValueError(f"its source cannot be parsed: {error}") from error
    definition = tree.body[0]
    if isinstance(definition, ast.If):
        definition = definition.body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise ValueError("its source is no definition of a function")
    ast.increment_lineno(tree, first - (2 if indented else 1))
    arguments = definition.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    definition.decorator_list, definition.returns = [], None
    return definition


def _compiled(definition: ast.FunctionDef, function: FunctionType) -> CodeType:
    """The code of a definition in the surroundings of `function`: its class, for private names, and free variables."""
    free, kind = function.__code__.co_freevars, _class_name(function.__qualname__)
    # What names the class within the function is looked up where it was, not here.
    outside = "" if kind in free else f" global {kind}\n"
    tree = ast.parse(f"def outer({', '.join((*free, _PARAMETER))}):\n{outside} class {kind}: pass")
    inner = cast(ast.ClassDef, cast(ast.FunctionDef, tree.body[0]).body[-1])
    inner.body = [definition]
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag  # of functions within
    module = compile(ast.fix_missing_locations(tree), function.__code__.co_filename, "exec", flags, True)
    code = _code_in(_code_in(_code_in(module, "outer"), kind), definition.name)
    return code.replace(co_name=function.__code__.co_name, co_qualname=function.__code__.co_qualname)


def _class_name(qualname: str) -> str:
    """The innermost class around a function."""
    parts = qualname.split(".")[:-1]
    while parts and parts[-1] == "<locals>":  # after the name of a function
        parts = parts[:-2]
    return parts[-1] if parts else _NO_CLASS


def _code_in(outer: CodeType, name: str) -> CodeType:
    return next(part for part in outer.co_consts if isinstance(part, CodeType) and part.co_name == name)


# How a method is called depends on what the rest of the file imports, which no result does.
_NO_STEPS = {"CACHE", "EXTENDED_ARG", "NOP", "PRECALL", "PUSH_NULL"}
_NO_ARGUMENT = {*dis.hasjrel, *dis.hasjabs}


def _same_code(one: object, other: object) -> bool:
    """Whether two codes do the same, wherever they stand in a file."""
    if not isinstance(one, CodeType) or not isinstance(other, CodeType):
        return type(one) is type(other) and one == other
    return _signature(one) == _signature(other) and all(
        here[0] == there[0] and _same_code(here[1], there[1])
        for here, there in zip_longest(_steps(one), _steps(other), fillvalue=("", None))
    )


def _signature(code: CodeType) -> tuple:
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount
    return counts, code.co_varnames, code.co_cellvars, code.co_freevars


def _steps(code: CodeType) -> Iterator[tuple[str, object]]:
    """Instructions and their arguments, without where they jump to."""
    for step in dis.get_instructions(code):
        if step.opname not in _NO_STEPS:
            yield step.opname.replace("METHOD", "ATTR"), None if step.opcode in _NO_ARGUMENT else step.argval
