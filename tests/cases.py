"""The contract cases of every op, collected from ``tests/ops/<op>/cases.py``.

An op's file defines

``CASES``
    its cases: plain, odd sizes, empty, every option, and each optional tensor given but empty;
``RICH``
    the label of the case with the most options, for tests that run one case per op;
``SPOILED``
    the input whose NaN and infinity must reach the output, or None;
``PER_IMAGE``
    the inputs whose first or batch dimension is that of the images: a larger batch has more of them;

and, where they apply,

``SCHEMA_NAMES``
    arguments of the schema by their public names, where the two differ;
``NEVER_EMPTY``
    optional tensors that always have one element;
``NO_OPCHECK``
    labels of cases that ``torch.library.opcheck`` itself does not handle;
``MATRIX_PRODUCTS``
    True if the Triton kernels multiply matrices: Triton's interpreter gets those of bf16 wrong.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

from mimkernels.testing import Case

FOLDER = Path(__file__).parent / "ops"


def ops_with(part: str) -> list[str]:
    """Names of the ops whose test folder has ``<part>.py``."""
    return sorted(file.parent.name for file in FOLDER.glob(f"*/{part}.py"))


def part_of(op: str, part: str) -> ModuleType:
    """The module ``tests/ops/<op>/<part>.py``."""
    return importlib.import_module(f"tests.ops.{op}.{part}")


OPS = ops_with("cases")


@functools.cache
def _cases(op: str) -> tuple[Case, ...]:
    cases = tuple(part_of(op, "cases").CASES)
    labels = [case.label for case in cases]
    assert {case.op for case in cases} == {op}, f"tests/ops/{op}/cases.py must hold cases of {op} alone"
    assert len(set(labels)) == len(labels), f"tests/ops/{op}/cases.py: labels must differ, got {labels}"
    return cases


def cases(op: str | None = None) -> list[Case]:
    """Every case, or those of one op."""
    return [case for name in (OPS if op is None else [op]) for case in _cases(name)]


def rich(op: str) -> Case:
    """The case of ``RICH``."""
    (case,) = (case for case in cases(op) if case.label == stated(op, "RICH"))
    return case


def stated(op: str, name: str, default=None):
    """What the op's ``cases.py`` says by that name, or the default."""
    return getattr(part_of(op, "cases"), name, default)
