"""Machine code that multiplies in tiles of AMX: which functions have it, how tiles are set up, the inner loops."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from mimkernels.ops import _native

LIBRARY = _native.FOLDER / "libmimkernels_cpu.so"
BUILDS = ("amx_bf16", "amx_emulated")  # the second in source trees alone

built = pytest.mark.skipif(
    not LIBRARY.exists() or "amx_bf16" not in _native.library("cpu").build.get("isas", {}),
    reason="the CPU library has no build for AMX",
)
pytestmark = built

# VEX.128.0F38.W0 with opcodes 49, 4B and 5C: all that AMX for bf16 has. Other bytes may read the same.
TILE_BYTES = re.compile(rb"\xc4[\x02\x22\x42\x62\x82\xa2\xc2\xe2][\x00-\x7f][\x49\x4b\x5c]")
TILE = re.compile(r"ldtilecfg|sttilecfg|tilerelease|tilezero|tileload\w+|tilestored|tdp\w+")


@dataclass(frozen=True)
class Function:
    """Where the code of a function lies."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly."""

    address: int
    name: str
    operands: str


def listed(*command: str) -> str:
    return subprocess.run([*command, LIBRARY], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def functions() -> list[Function]:
    found = []
    for line in listed("nm", "-C", "-S", "--defined-only").splitlines():
        match = re.match(r"([0-9a-f]+) ([0-9a-f]+) [tTwW] (.*)", line)
        if match:
            found.append(Function(match[3], int(match[1], 16), int(match[2], 16)))
    assert found, "the library has no symbols"
    return found


def disassemble(function: Function) -> list[Instruction]:
    bounds = (f"--start-address={function.start}", f"--stop-address={function.start + function.size}")
    lines = re.finditer(r"^ *([0-9a-f]+):\t(\S+) *(.*)$", listed("objdump", "-d", "--no-show-raw-insn", *bounds), re.M)
    return [Instruction(int(line[1], 16), line[2], line[3].split("#")[0].split("<")[0].strip()) for line in lines]


@pytest.fixture(scope="module")
def suspects(functions) -> list[Function]:
    """Functions with bytes that could be a tile instruction."""
    row = next(line.split() for line in listed("objdump", "-h").splitlines() if " .text " in line)
    address, offset, size = int(row[3], 16), int(row[5], 16), int(row[2], 16)
    places = [match.start() + address for match in TILE_BYTES.finditer(LIBRARY.read_bytes()[offset : offset + size])]
    return [f for f in functions if any(f.start <= place < f.start + f.size for place in places)]


def with_tiles(functions: list[Function]) -> dict[str, list[Instruction]]:
    """The functions that have a tile instruction."""
    texts = {f"{f.name} at {f.start:#x}": disassemble(f) for f in functions}
    return {name: text for name, text in texts.items() if any(TILE.fullmatch(i.name) for i in text)}


@pytest.fixture(scope="module", params=BUILDS)
def code(request, functions, suspects) -> dict[str, list[Instruction]]:
    if not any(f"::{request.param}::" in f.name for f in functions):
        assert request.param != "amx_bf16"
        pytest.skip(f"the library has no {request.param}")
    return with_tiles([f for f in suspects if f"::{request.param}::" in f.name])


def test_no_other_function_has_tile_instructions(suspects):
    assert not list(with_tiles([f for f in suspects if not any(f"::{build}::" in f.name for build in BUILDS)]))


def test_the_forward_the_gradients_and_the_products_have_them(code):
    setting_up = [name for name, text in code.items() if any(i.name == "ldtilecfg" for i in text)]
    multiplying = [name for name, text in code.items() if any(i.name == "tdpbf16ps" for i in text)]
    assert len(setting_up) >= 2 and len(multiplying) >= 2
    assert any("Fwd" in name or "fwd" in name for name in setting_up), setting_up
    assert any("Bwd" in name or "bwd" in name or "run_pass" in name for name in setting_up), setting_up


# ---- setting up ----

WIDTHS = {"movb": 1, "movw": 2, "movl": 4, "movq": 8}
REGISTERS = {"xmm": 16, "ymm": 32, "zmm": 64}


def stored(instruction: Instruction) -> tuple[str, int, int] | None:
    """Base, offset and bytes of a store to a place that is known at compile time."""
    match = re.fullmatch(r"(.*),(-?0x[0-9a-f]+|)\((%\w+)\)", instruction.operands)
    if not match or not instruction.name.startswith(("mov", "vmov")) or "(" in match[1]:
        return None
    vector = re.fullmatch(r"%(xmm|ymm|zmm)\d+", match[1])
    if vector:
        size = 8 if instruction.name in ("vmovq", "vmovlps", "vmovhps") else REGISTERS[vector[1]]
        size = 4 if instruction.name in ("vmovd", "vmovss") else size
    elif instruction.name in WIDTHS:
        size = WIDTHS[instruction.name]
    elif re.fullmatch(r"%(r\w\w|r\d+)", match[1]):
        size = 8
    else:
        size = {"d": 4, "w": 2, "b": 1}.get(match[1][-1], 4 if match[1].startswith("%e") else 1)
    return match[3], int(match[2] or "0", 16), size


def test_all_64_bytes_of_the_shapes_are_stored_before_they_are_loaded(code):
    found = 0
    for name, text in code.items():
        for at, instruction in enumerate(text):
            if instruction.name != "ldtilecfg":
                continue
            found += 1
            offset, base = re.fullmatch(r"(-?0x[0-9a-f]+|)\((%\w+)\)", instruction.operands).groups()
            missing = set(range(64))
            for store in filter(None, map(stored, text[max(at - 60, 0) : at])):
                if store[0] == base:
                    start = store[1] - int(offset or "0", 16)
                    missing -= set(range(start, start + store[2]))
            assert not missing, (name, hex(instruction.address), sorted(missing))
    assert found >= 2


def paths_from(text: list[Instruction], start: int) -> Iterator[Instruction]:
    """Where paths from an instruction end without a tilerelease: at what leaves the function."""
    by_address = {instruction.address: i for i, instruction in enumerate(text)}
    seen, waiting = set(), [start]
    while waiting:
        i = waiting.pop()
        if i in seen or text[i].name == "tilerelease":
            continue
        seen.add(i)
        instruction = text[i]
        jump = instruction.name.startswith("j")
        target = by_address.get(int(instruction.operands, 16)) if jump and "*" not in instruction.operands else None
        leaves = instruction.name in ("ret", "repz", "ud2", "hlt") or (jump and target is None)
        if leaves or i + 1 == len(text):
            yield instruction
            continue
        if target is not None:
            waiting.append(target)
        if instruction.name not in ("jmp", "notrack"):
            waiting.append(i + 1)


def test_tiles_are_released_on_every_path(code):
    for name, text in code.items():
        for at, instruction in enumerate(text):
            if instruction.name == "ldtilecfg":
                assert not [hex(end.address) for end in paths_from(text, at + 1)], name


# ---- inner loops ----


def inner_loops(text: list[Instruction]) -> Iterator[list[Instruction]]:
    """The loops with a product and no loop within."""
    by_address = {instruction.address: i for i, instruction in enumerate(text)}
    loops = []
    for i, instruction in enumerate(text):
        if instruction.name.startswith("j") and "*" not in instruction.operands:
            target = by_address.get(int(instruction.operands, 16), len(text))
            if target <= i:
                loops.append((target, i + 1))
    for first, last in loops:
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in loops):
            if any(instruction.name == "tdpbf16ps" for instruction in text[first:last]):
                yield text[first:last]


def test_inner_loops_are_loads_products_and_little_else(code):
    shapes = []
    for name, text in code.items():
        if "multiply_all_tiles" not in name:
            continue
        for loop in inner_loops(text):
            names = [instruction.name for instruction in loop]
            products, loads = names.count("tdpbf16ps"), names.count("tileloadd")
            others = [instruction for instruction in loop if not TILE.fullmatch(instruction.name)]
            assert {i.name for i in others} <= {"lea", "add", "sub", "inc", "dec", "cmp", "test", "jne", "jg", "jl"}
            assert not [i for i in others if i.name != "lea" and "(" in i.operands], "something is kept in memory"
            assert set(names) - {i.name for i in others} == {"tdpbf16ps", "tileloadd"}
            assert loads == {4: 4, 2: 3, 1: 2}[products] and len(others) <= 7
            shapes.append(products)
    # With and without C added: 2 x 2 tiles, 2 x 1, 1 x 2 and 1 x 1.
    assert sorted(shapes) == [1, 1, 2, 2, 2, 2, 4, 4]
