"""Where PyTorch's own attention is faster than ours, by measurement: the table ``measured.json``, and how it is read.

``python -m benchmarks measure-attention`` writes the table: for a device, the instruction set of our kernels on it and
a dtype, the time of ``mimkernels.attention`` without statistics as a share of that of PyTorch's, by number of tokens
and head dim, of forward passes and of forward and backward passes together ("training"). What stands in for PyTorch's
attention asks ``why_torch`` and leaves a call to PyTorch where that share is above 1. The measurement that counts for a
call is

- of its device, its dtype and its pass;
- of its instruction set, or else of the nearest one that multiplies this dtype in the same way;
- of the nearest head dim, then of the nearest number of tokens, both by ratio. Cross-attention counts as self-attention
  of as many scores. Images, heads and masks do not count.

Where there is none, the call is ours: who lets a model run on these kernels wants them, unless they are known to be
slower. Calls whose statistics somebody wants, and calls on a named backend (``use_backend``, ``MIMKERNELS_BACKEND``),
are ours, too.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_exporting

from mimkernels.nn.sdpa.observe import wants_statistics
from mimkernels.nn.sdpa.translate import compute_dtype
from mimkernels.ops import _native
from mimkernels.ops._autograd import transformed
from mimkernels.ops._checks import needs_grad
from mimkernels.ops._memo import MOST
from mimkernels.ops._registry import backend_in_force

__all__ = [
    "PASSES",
    "TABLE",
    "Measured",
    "Point",
    "checked",
    "instruction_set",
    "reasons",
    "why_torch",
    "why_torch_packed",
]

TABLE = Path(__file__).with_name("measured.json")
PASSES = ("forward", "training")  # without gradients, and with them: forward and backward

# Instruction sets of our CPU kernels that multiply a dtype in the same way, neighbours side by side.
_ALIKE: tuple[tuple[str, ...], ...] = (("portable", "avx2", "avx2_bf16", "avx512", "avx512_bf16", "amx_bf16"),)
_ALIKE_IN_BF16: tuple[tuple[str, ...], ...] = (("portable", "avx2", "avx512"), ("avx512_bf16",), ("amx_bf16",))


class Point(NamedTuple):
    """One measurement: ``ratio`` is the time of ours over that of PyTorch's attention."""

    tokens: int
    head_dim: int
    ratio: float


class Measured(NamedTuple):
    """The measurements of one device, instruction set and dtype, by pass."""

    device: str
    instruction_set: str
    dtype: str
    points: dict[str, list[Point]]


Value = TypeVar("Value")
# Values by head dim and number of tokens: each with the largest square that it holds up to, None for the last.
_Steps = tuple[tuple[int | None, Value], ...]


def why_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """Why PyTorch's attention should compute this call: it is faster, and nobody wants statistics or a backend.

    Under the transforms of ``torch.func`` and with forward-mode gradients, nothing was measured.

    Args:
        q, k, v: ``[..., N, D]``, q of no class of its own; under autocast as they are before.
        mask: as given to ``F.scaled_dot_product_attention``.

    Returns:
        None if ours should; while compiling, where nobody is told, a reason without words.
    """
    if q.is_nested or k.is_nested or q.dim() < 2 or k.dim() < 2:
        return None
    return _why(q, q.size(-2) * k.size(-2), q.size(-1), (q, k, v, mask))


def why_torch_packed(qkv: Tensor) -> str | None:
    """``why_torch`` of self-attention without a mask, by its packed projection ``[B, N, 3, H, D]``."""
    tokens = qkv.size(1)
    return _why(qkv, tokens * tokens, qkv.size(4), (qkv,))


def _why(q: Tensor, scores: int, dim: int, tensors: tuple[Tensor | None, ...]) -> str | None:
    """``why_torch`` by device and dtype of `q`, the product of both lengths and the head dim."""
    if is_compiling():
        if is_exporting() and not isinstance(scores, int):  # what is exported must hold for any number of tokens
            return None
        passes = _slower(q.device.type, compute_dtype(q))
        slower = None if passes is None else passes[needs_grad(*tensors)]
        return "" if slower is not None and _is_slower(slower, scores, dim) and backend_in_force() == "auto" else None
    # What follows costs as little as it can: small models feel every step.
    device = "cpu" if q.is_cpu else q.device.type
    dtype = compute_dtype(q) if torch._C._is_any_autocast_enabled() else q.dtype
    passes = _known.get((device, dtype), _UNKNOWN)
    if passes is _UNKNOWN:
        passes = _slower(device, dtype)
    if passes is None:
        return None
    call = scores, dim, dtype, device
    lines = _decided.get(call)
    if lines is None:
        lines = tuple(_line(device, dtype, kind, scores, dim) for kind in PASSES)
        if len(_decided) >= MOST:
            _decided.clear()
        _decided[call] = lines = _BY_OURS if lines == _BY_OURS else lines
    if lines is _BY_OURS:
        return None
    line = lines[needs_grad(*tensors)]
    if line is None or transformed() or backend_in_force() != "auto" or wants_statistics():
        return None
    return line


def reasons(device: str, dtype: torch.dtype, tokens: int, head_dim: int) -> list[str]:
    """Where PyTorch's attention is faster than ours at these sizes, a line for each pass; empty where it is not."""
    lines = (_line(device, dtype, kind, tokens * tokens, head_dim) for kind in PASSES)
    return [line for line in lines if line is not None]


def instruction_set(device: str) -> str | None:
    """What our kernels run on a type of device: of CPUs as in ``mimkernels info``, of GPUs such as ``sm_90``."""
    if device == "cpu":
        return _native.library("cpu").isa
    if device == "cuda" and torch.cuda.is_available():
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    return None


def checked(table: Any, source: str) -> list[Measured]:
    """The rows of a table as it was read from JSON.

    Raises:
        ValueError: it is no such table; names the place in `source`, what is there and what would be right.
    """

    def refuse(place: str, found: object, wanted: str) -> ValueError:
        return ValueError(f"{source}: {place} must be {wanted}, got {json.dumps(found)}")

    rows = table.get("measured") if isinstance(table, dict) else None
    if not isinstance(rows, list) or not isinstance(table.get("comment"), str):
        raise refuse("the table", table, '{"comment": "...", "measured": [...]}')
    measured = []
    for number, row in enumerate(rows):
        place = f"measured[{number}]"
        texts = ("device", "instruction_set", "dtype", "machine", "torch", "comment")
        if not isinstance(row, dict) or row.keys() != {*texts, *PASSES}:
            raise refuse(place, row, f"an object of {', '.join((*texts, *PASSES))}")
        for name in texts:
            if not isinstance(row[name], str):
                raise refuse(f"{place}.{name}", row[name], "a string")
        if not isinstance(getattr(torch, row["dtype"], None), torch.dtype):
            raise refuse(f"{place}.dtype", row["dtype"], "the name of a dtype of torch")
        points: dict[str, list[Point]] = {}
        for kind in PASSES:
            for one in row[kind] if isinstance(row[kind], list) else [row[kind]]:
                types = [type(value) for value in one] if isinstance(one, list) else []
                if types not in ([int] * 3, [int, int, float]) or not all(0 < value < math.inf for value in one):
                    raise refuse(f"{place}.{kind}", one, "positive [tokens, head dim, ratio]")
            points[kind] = [Point(*one) for one in row[kind]]
            if len({point[:2] for point in points[kind]}) < len(points[kind]):
                raise refuse(f"{place}.{kind}", row[kind], "one ratio for each [tokens, head dim]")
        measured.append(Measured(row["device"], row["instruction_set"], row["dtype"], points))
    places = [row[:3] for row in measured]
    if len(set(places)) < len(places):
        raise refuse("the table", [list(place) for place in places], "one row for each device, instruction set, dtype")
    return measured


@functools.cache
def _rows() -> list[Measured]:
    return checked(json.loads(TABLE.read_text()), TABLE.name)


# Where PyTorch's attention is faster, by head dim and number of tokens: of one pass, of both; None where it never is.
_Slower = _Steps[_Steps[bool]] | None
_Passes = tuple[_Slower, _Slower] | None

# functools.cache would be seen through, and warned of, by torch.compile.
_known: dict[tuple[str, torch.dtype], _Passes] = {}
_UNKNOWN: Any = object()
# By the product of both lengths, head dim, dtype and device: why PyTorch's attention computes the call, by pass.
_decided: dict[tuple[int, int, torch.dtype, str], tuple[str | None, ...]] = {}
_BY_OURS = (None, None)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # of torch
def _slower(device: str, dtype: torch.dtype) -> _Passes:
    if (device, dtype) not in _known:
        forward, training = (_where_slower(device, dtype, kind) for kind in PASSES)
        _known[device, dtype] = (forward, training) if forward or training else None
    return _known[device, dtype]


def _is_slower(slower: _Steps[_Steps[bool]], scores: int, dim: int) -> bool:
    return _at(_at(slower, dim * dim), scores)


def _line(device: str, dtype: torch.dtype, kind: str, scores: int, head_dim: int) -> str | None:
    """That PyTorch's attention is faster, in words; None if it is not."""
    found = _nearest(device, dtype, kind)
    if found is None:
        return None
    where, by_dim = found
    point = _at(_at(by_dim, head_dim * head_dim), scores)
    if point.ratio <= 1:
        return None
    training = " in training" if kind == "training" else ""
    return (
        f"torch's attention is kept for {_name(dtype)}{training} near {point.tokens} tokens, head dim "
        f"{point.head_dim}: {point.ratio:.2f} times as fast on {where}"
    )


def _where_slower(device: str, dtype: torch.dtype, kind: str) -> _Slower:
    found = _nearest(device, dtype, kind)
    if found is None:
        return None
    # Neighbours that agree are one step, so that compiled code is specialised by as few sizes as possible.
    steps = _joined([(dim, _joined([(n, point.ratio > 1) for n, point in row])) for dim, row in found[1]])
    return None if steps == ((None, ((None, False),)),) else steps


def _nearest(device: str, dtype: torch.dtype, kind: str) -> tuple[str, _Steps[_Steps[Point]]] | None:
    """The measurements that count on this device, in this dtype and pass, and of which instruction set they are."""
    here = instruction_set(device)
    rows = [row for row in _rows() if row.device == device and row.dtype == _name(dtype) and row.points[kind]]
    by_set = {row.instruction_set: row for row in rows}
    if here not in by_set and device == "cpu":
        alike = next((sets for sets in (_ALIKE_IN_BF16 if dtype == torch.bfloat16 else _ALIKE) if here in sets), ())
        others = [name for name in alike if name in by_set]
        if others:
            here = min(others, key=lambda name: abs(alike.index(name) - alike.index(here)))
    if here is None or here not in by_set:
        return None
    points = sorted(by_set[here].points[kind], key=lambda point: (point.head_dim, point.tokens))
    dims = [(dim, list(group)) for dim, group in groupby(points, key=lambda point: point.head_dim)]
    return here, _steps([(dim, _steps([(point.tokens, point) for point in group])) for dim, group in dims])


def _steps(sizes: Sequence[tuple[int, Value]]) -> _Steps[Value]:
    """Each value up to where the next one is nearer by ratio: where the square of a size is the product of both."""
    edges = [size * following for (size, _), (following, _) in pairwise(sizes)]
    return tuple(zip((*edges, None), (value for _, value in sizes), strict=True))


def _joined(steps: Sequence[tuple[int | None, Value]]) -> _Steps[Value]:
    """The same with one step where neighbours have the same value."""
    return tuple((list(group)[-1][0], value) for value, group in groupby(steps, key=lambda step: step[1]))


def _at(steps: _Steps[Value], square: int) -> Value:
    """The value that holds for a size, given by its square."""
    for edge, value in steps:
        if edge is None or square <= edge:
            return value
    raise AssertionError("the last step has no edge")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
