"""Triton's interpreter, as the tests quicken it."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton is not interpreted", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from tests.interpreter import quicken_interpreter  # noqa: E402


@triton.jit
def doubled(x):
    return x + x


@triton.jit
def add_up_kernel(x_ptr, out_ptr, rows, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    total = tl.zeros((COLUMNS,), tl.float32)
    for _ in range(3):
        total += doubled(tl.load(x_ptr + row * COLUMNS + tl.arange(0, COLUMNS)))
    tl.store(out_ptr + row, tl.sum(total, 0))
    tl.store(out_ptr + rows + row, tl.cdiv(row, 2))


def test_the_language_is_replaced_once_per_launch_and_put_back(monkeypatch):
    replaced = []
    before = interpreter._patch_lang.__wrapped__
    monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: replaced.append(fn) or before(fn))
    for place, name in (
        (interpreter.GridExecutor, "__call__"),
        (interpreter, "_get_np_dtype"),
        (tl.block_type, "__init__"),
        (tl.tensor, "__init__"),
    ):
        monkeypatch.setattr(place, name, getattr(place, name).__wrapped__)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions())
    quicken_interpreter()
    load = tl.load
    for _ in range(2):
        replaced.clear()
        x, out = torch.arange(12.0).view(3, 4), torch.zeros(2, 3)
        add_up_kernel[(3,)](x, out, 3, COLUMNS=4)
        assert out.tolist() == [[36.0, 132.0, 228.0], [0.0, 1.0, 1.0]]
        assert 1 <= len(replaced) <= 2, "the kernel's, and that of triton.language's own functions"
        assert tl.load is load


def test_dtypes_are_those_of_the_interpreter():
    plain = interpreter._get_np_dtype.__wrapped__
    kinds = [getattr(tl, name) for name in ("int1", "int32", "uint8", "int64", "float16", "bfloat16", "float32")]
    kinds += [tl.pointer_type(tl.float32), tl.block_type(tl.pointer_type(tl.int8), [4])]
    kinds += [tl.block_type(kind, [2, 8]) for kind in kinds[:7]]
    for _ in range(2):
        assert [interpreter._get_np_dtype(kind) for kind in kinds] == [plain(kind) for kind in kinds]


@pytest.mark.parametrize("element", [tl.float32, tl.pointer_type(tl.int8)], ids=str)
@pytest.mark.parametrize("shape", [[4], [tl.constexpr(2), 8], tl.tuple([1, 2, 4])], ids=str)
def test_types_and_tensors_are_those_of_the_interpreter(element, shape):
    for _ in range(2):
        made, plain = tl.block_type(element, shape), tl.block_type.__new__(tl.block_type)
        tl.block_type.__init__.__wrapped__(plain, element, shape)
        assert made == plain and vars(made).keys() == vars(plain).keys() and made.element_ty is element
        assert (made.shape.values, made.numel, made.name) == (plain.shape.values, plain.numel, plain.name)
        for kind in (made, element):
            handle = object()
            ours, theirs = tl.tensor(handle, kind), tl.tensor.__new__(tl.tensor)
            tl.tensor.__init__.__wrapped__(theirs, handle, kind)
            assert vars(ours).keys() == vars(theirs).keys()
            assert ours.handle is handle and ours.type is kind and ours.dtype == theirs.dtype
            assert str(ours.shape) == str(theirs.shape) and ours.numel.value == theirs.numel.value


def test_shapes_that_are_none_are_refused():
    for _ in range(2):
        with pytest.raises(ValueError, match="power of 2"):
            tl.block_type(tl.int32, [3])
        assert tl.block_type(tl.int32, [4]).numel == 4
        with pytest.raises(AssertionError):  # only lists and tuples of triton.language
            tl.block_type(tl.int32, (4,))


def test_without_debug_mode_nobody_asks_whether_integers_overflow(monkeypatch):
    builder = interpreter.interpreter_builder
    assert not builder.options.debug and not builder.options.sanitize_overflow
    values = [tl.tensor(interpreter.TensorHandle(np.array([2**31 - 1], np.int32), tl.int32), tl.int32)] * 2
    semantic = interpreter.interpreter_semantic
    quick = semantic.add(*values, True).handle.data
    for debug in (False, True):
        monkeypatch.setattr(builder, "options", interpreter.InterpreterOptions(debug=debug))
        if debug:
            with pytest.raises(AssertionError, match="int32 overflow detected for operation add"):
                semantic.add(*values, True)
        else:
            assert semantic.add(*values, True).handle.data == quick == -2
