"""csrc/kernels.def is the one list of native kernels: its lines, the sources and the registered ops say the same."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import mimkernels
from mimkernels.ops import _native

CSRC = Path(mimkernels.__file__).parents[1] / "csrc"
LINES = re.findall(r"^MIMKERNELS_KERNEL\((\w+), (\w+), (\w+), (\w+)\)$", (CSRC / "kernels.def").read_text(), re.M)
OPS = sorted({op for op, *_ in LINES})
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".def"))
FIELDS = "grid|in|out|noise|keys|rank|numerics|bounds|cost|order|rest"


def registered(overload: str) -> set[str]:
    """Schemas that have this overload."""
    names = [name.removeprefix("mimkernels::") for name in torch._C._dispatch_get_all_op_names()]
    return {name.removesuffix(f".{overload}") for name in names if name.endswith(f".{overload}")}


def test_every_line_is_read_and_names_a_kernel_once():
    text = (CSRC / "kernels.def").read_text()
    assert len(LINES) == len(re.findall(r"^MIMKERNELS_KERNEL", text, re.M)) > 20
    assert len({(op, step) for op, step, *_ in LINES}) == len(LINES)


def test_ops_and_folders_are_the_same():
    assert OPS == sorted(path.name for path in (CSRC / "ops").iterdir())


@pytest.mark.parametrize(("op", "step", "params", "key"), LINES, ids=lambda value: value)
def test_every_line_has_its_sources(op, step, params, key):
    folder = CSRC / "ops" / op
    name = f"{op}_{step}"
    for kernel, launcher in ((f"cpu_{step}.cpp", f"Status {name}(const {params}& "),
                             (f"cuda_{step}.cu", f"cudaError_t {name}(const {params}& ")):  # fmt: skip
        assert launcher in (folder / kernel).read_text(), f"{kernel} does not define {launcher}..."
    assert f"MIMKERNELS_BIND_CPU({op}, {step})" in (folder / "bind_cpu.cpp").read_text()
    assert re.search(rf"MIMKERNELS_BIND_CUDA(_\w+)?\({op}, {step}\)", (folder / "bind_cuda.cpp").read_text())


@pytest.mark.parametrize("overload", ["cpu", "cuda"])
def test_every_schema_has_its_line(overload):
    assert registered(overload) == {f"{op}_{step}" for op, step, *_ in LINES}


@pytest.mark.parametrize("library", [_native.library("cpu"), _native.library("cuda_emulated")], ids=lambda it: it.name)
def test_every_line_is_registered_under_its_key(library):
    if not library.loaded:
        pytest.skip(f"no {library.name} library: {library.reason}")
    keys = {"Tensor": "CPU", "None": "CompositeExplicitAutograd"}
    for op, step, _, key in LINES:
        name = f"mimkernels::{op}_{step}.{library.name}"
        for each, torch_key in keys.items():
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, torch_key) == (each == key), (name, torch_key)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(CSRC)))
def test_contract_comments_are_aligned_lists(file):
    """Every field of a contract begins a line, its text in the same column, which its further lines keep."""
    field = None
    for number, line in enumerate(file.read_text().splitlines(), 1):
        comment = re.match(r" *// (.*)$", line)
        field = field if comment else None
        if not comment:
            continue
        start = re.match(rf"({FIELDS}):( +)", comment[1])
        assert not re.search(rf"\S +({FIELDS}):  ", comment[1]), f"{file}:{number}: a field inside a line"
        if start:
            assert start.end() == 10, f"{file}:{number}: the text of a field starts in column 10"
            field = start[1]
        elif field:
            assert comment[1].startswith(" " * 10), f"{file}:{number}: belongs to {field}, but is not aligned"


def test_bindings_compile_where_the_stable_abi_has_its_oldest_names(tmp_path):
    """Torch 2.10 checks calls by TORCH_ERROR_CODE_CHECK; stand-ins of its headers have that alone."""
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    headers = {
        "csrc/stable/library.h": "",
        "csrc/stable/macros.h": "",
        "headeronly/util/shim_utils.h": "#define TORCH_ERROR_CODE_CHECK(call) if ((call) != 0) throw 1",
    }
    for name, text in headers.items():
        header = tmp_path / "torch" / name
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(f"#pragma once\n{text}\n")
    source = tmp_path / "call.cpp"
    source.write_text('#include "torch/registration.h"\nvoid call(int code) { STABLE_TORCH_ERROR_CODE_CHECK(code); }\n')
    command = [compiler, "-std=c++20", "-fsyntax-only", f"-I{CSRC}", f"-isystem{tmp_path}", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
