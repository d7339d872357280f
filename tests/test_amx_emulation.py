"""Tile instructions of AMX, emulated: what each does and is refused for; products and attention that take them."""

import ctypes
import mmap
import platform
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mimkernels import attention
from mimkernels.ops import _native
from tests.test_instruction_sets import on_an_instruction_set

LIBRARY = _native.FOLDER / "libmimkernels_emulation_tests.so"
BUILD = _native.library("cpu").build
HERE = "amx_bf16" in BUILD.get("isas", {}) and sys.platform == "linux" and LIBRARY.exists()
CPU_INFO = Path("/proc/cpuinfo")
AMX_HERE = CPU_INFO.exists() and "amx_bf16" in CPU_INFO.read_text()
built = pytest.mark.skipif(not HERE, reason="the emulation of AMX is not built")


def test_gcc_on_linux_builds_the_emulation():
    version = re.match(r"GNU (\d+)", BUILD.get("compiler", ""))
    if not (LIBRARY.exists() and platform.machine() == "x86_64" and version and int(version[1]) >= 12):
        pytest.skip("the emulation is built in source trees on x86-64 Linux by GCC 12 and later")
    assert HERE


# ---- single instructions ----

REGISTERS = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()
CODES = {
    "ldtilecfg (%rdi)": "c4e2784907",
    "ldtilecfg -0x270(%rbp)": "c4e27849ad90fdffff",
    "ldtilecfg 0x8(%rax,%r9,8)": "c4a2784944c808",
    "tilerelease": "c4e27849c0",
    "tilezero %tmm5": "c4e27b49e8",
    "tileloadd (%rsi,%rdi,1),%tmm6": "c4e27b4b343e",
    "tileloadd (%rsi,%rdi,1),%tmm5": "c4e27b4b2c3e",
    "tileloadd (%rsi,%rdi,1),%tmm0": "c4e27b4b043e",
    "tileloadd 0x40(%r13,%r12,4),%tmm3": "c4827b4b5ca540",
    "tileloaddt1 -0x200(%rbp,%r15,8),%tmm7": "c4a2794bbcfd00feffff",
    "tilestored %tmm0,(%rsi,%rdi,1)": "c4e27a4b043e",
    "tilestored %tmm4,(%r12,%rsi,2)": "c4c27a4b2474",
    "tdpbf16ps %tmm6,%tmm5,%tmm0": "c4e24a5cc5",
    "sttilecfg (%rdi)": "c4e2794907",
    "vpaddd %ymm1,%ymm2,%ymm3": "c5edfed9",
    "vfmadd231ps %ymm1,%ymm2,%ymm3": "c4e26db8d9",
}
TWICE = "c4e24a5cc6"  # tdpbf16ps %tmm6,%tmm6,%tmm0, which no assembler takes
NO_BASE = "c4e27b4b06"  # tileloadd (%rsi),%tmm0 without a byte for base and index


class Machine:
    """The emulated tiles of this thread."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.amx_tile.restype = ctypes.c_void_p

    def run(self, code: str, **registers: int) -> str:
        """Execute the instruction of a text or its bytes; the text of its fault."""
        raw = bytes.fromhex(CODES.get(code, code))
        values = (ctypes.c_uint64 * 16)(*(registers.get(name, 0) & 2**64 - 1 for name in REGISTERS))
        fault = ctypes.c_char_p()
        length = self.library.amx_execute(raw + bytes(8), values, ctypes.byref(fault))
        assert length == (-1 if fault.value else len(raw) * (raw[:1] == b"\xc4" and raw[3] != 0xB8))
        return (fault.value or b"").decode()

    def configure(self, rows=(16,) * 8, row_bytes=(64,) * 8, palette=1, code="ldtilecfg (%rdi)", **changes: int) -> str:
        raw = bytearray(struct.pack("<BB14x16H16B", palette, 0, *row_bytes, *[0] * 8, *rows, *[0] * 8))
        for place, value in changes.items():
            raw[int(place.removeprefix("byte"))] = value
        kept = ctypes.create_string_buffer(bytes(raw), 64)
        return self.run(code, rdi=ctypes.addressof(kept))

    def tile(self, number: int) -> torch.Tensor:
        """The 16 rows of 64 bytes of a tile."""
        return torch.frombuffer(bytearray(ctypes.string_at(self.library.amx_tile(number), 1024)), dtype=torch.uint8)


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine(ctypes.CDLL(str(LIBRARY)))
    yield made
    made.run("tilerelease")


@built
def test_the_bytes_are_the_instructions(tmp_path):
    (tmp_path / "code").write_bytes(bytes.fromhex("".join(CODES.values())))
    command = ["objdump", "-D", "-b", "binary", "-m", "i386:x86-64", "--no-show-raw-insn", tmp_path / "code"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    texts = [" ".join(line.split()[1:]) for line in listed.splitlines() if re.match(r"\s+[0-9a-f]+:\t", line)]
    assert texts == list(CODES)


@built
def test_tiles_are_loaded_and_stored_by_base_index_and_displacement(machine):
    assert machine.configure() == ""
    memory = torch.randint(0, 256, (8192,), dtype=torch.uint8)
    start = memory.data_ptr()

    def rows(offset, stride):
        return torch.stack([memory[offset + i * stride :][:64] for i in range(16)]).flatten()

    machine.run("tileloadd (%rsi,%rdi,1),%tmm6", rsi=start, rdi=100)
    assert torch.equal(machine.tile(6), rows(0, 100))
    machine.run("tileloadd 0x40(%r13,%r12,4),%tmm3", r13=start, r12=25)
    assert torch.equal(machine.tile(3), rows(64, 100))
    machine.run("tileloaddt1 -0x200(%rbp,%r15,8),%tmm7", rbp=start + 2048 + 0x200, r15=-16)
    assert torch.equal(machine.tile(7), rows(2048, -128))
    machine.run("tileloadd (%rsi,%rdi,1),%tmm0", rsi=start, rdi=64)
    taken = torch.full((4096,), 7, dtype=torch.uint8)
    machine.run("tilestored %tmm0,(%rsi,%rdi,1)", rsi=taken.data_ptr(), rdi=128)
    assert torch.equal(taken[:2048].view(16, 128)[:, :64].flatten(), memory[:1024])
    assert (taken[:2048].view(16, 128)[:, 64:] == 7).all() and (taken[2048:] == 7).all()
    machine.run("tileloadd (%rsi,%rdi,1),%tmm5", rsi=start, rdi=64)
    machine.run("tilezero %tmm5")
    assert not machine.tile(5).any()


@built
def test_a_tile_has_the_rows_and_bytes_it_was_set_up_with(machine):
    assert machine.configure(rows=(3,) + (16,) * 7, row_bytes=(20,) + (64,) * 7) == ""
    memory = torch.full((1024,), 255, dtype=torch.uint8)
    machine.run("tileloadd (%rsi,%rdi,1),%tmm0", rsi=memory.data_ptr(), rdi=64)
    assert machine.tile(0).view(16, 64)[:3, :20].eq(255).all() and machine.tile(0).count_nonzero() == 60
    taken = torch.zeros(1024, dtype=torch.uint8)
    machine.run("tilestored %tmm0,(%rsi,%rdi,1)", rsi=taken.data_ptr(), rdi=64)
    assert torch.equal(taken, machine.tile(0))


@built
@pytest.mark.parametrize(
    ("shapes", "fault"),
    [
        ({"palette": 0}, "palette"),
        ({"palette": 2}, "palette"),
        ({"rows": (17,) + (16,) * 7}, "16 rows"),
        ({"row_bytes": (68,) + (64,) * 7}, "64 bytes"),
        ({"rows": (0,) + (16,) * 7}, "bytes without rows"),
        ({"row_bytes": (64,) * 7 + (0,)}, "rows without bytes"),
        ({"byte2": 1}, "reserved"),
        ({"byte15": 1}, "reserved"),
        ({"byte32": 64}, "8 tiles"),
        ({"byte63": 16}, "8 tiles"),
        ({"code": "sttilecfg (%rdi)"}, "not emulated"),
    ],
)
def test_wrong_shapes_are_refused(machine, shapes, fault):
    assert fault in machine.configure(**shapes)
    assert "not set up" in machine.run("tilezero %tmm5")
    assert machine.configure() == ""


@built
def test_tiles_are_refused_unless_set_up(machine):
    for code in CODES:
        if code.startswith(("tilezero", "tilel", "tiles", "tdp")):
            assert "not set up" in machine.run(code), code
    assert "not in use" in machine.run("tilerelease")
    assert machine.configure() == ""
    assert "already" in machine.configure()
    assert machine.run("tilerelease") == ""
    assert "not set up" in machine.run("tilezero %tmm5")


@built
@pytest.mark.parametrize(
    ("rows", "row_bytes", "fault"),
    [
        ((15, *(16,) * 7), (64,) * 8, "C and A differ in rows"),
        ((16,) * 8, (60, *(64,) * 7), "C and B differ in columns"),
        ((16,) * 8, (*(64,) * 5, 60, 64, 64), "as many pairs"),
        ((*(16,) * 6, 15, 16), (64,) * 8, "as many pairs"),
        ((16,) * 8, (*(64,) * 5, 62, 64, 64), "multiples of 4"),
        ((*(16,) * 5, 0, 16, 16), (*(64,) * 5, 0, 64, 64), "without a shape"),
        ((9, *(16,) * 4, 9, 5, 16), (12, *(64,) * 4, 20, 12, 64), ""),
    ],
)
def test_products_of_unlike_shapes_are_refused(machine, rows, row_bytes, fault):
    assert machine.configure(rows, row_bytes) == ""
    said = machine.run("tdpbf16ps %tmm6,%tmm5,%tmm0")
    assert fault in said and bool(fault) == bool(said)


@built
def test_wrong_encodings_are_refused(machine):
    assert machine.configure() == ""
    assert "twice" in machine.run(TWICE)
    assert "without base and stride" in machine.run(NO_BASE)


@built
def test_other_instructions_are_none_of_its_own(machine):
    for code in ("vpaddd %ymm1,%ymm2,%ymm3", "vfmadd231ps %ymm1,%ymm2,%ymm3"):
        assert machine.run(code) == ""


def step(machine: Machine, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """One tdpbf16ps of A [16, 32], B [32, 16] and C [16, 16]."""
    assert machine.configure() == ""
    pairs = b.view(16, 2, 16).transpose(1, 2).contiguous()
    machine.run("tileloadd (%rsi,%rdi,1),%tmm5", rsi=a.data_ptr(), rdi=64)
    machine.run("tileloadd (%rsi,%rdi,1),%tmm6", rsi=pairs.data_ptr(), rdi=64)
    machine.run("tileloadd (%rsi,%rdi,1),%tmm0", rsi=c.data_ptr(), rdi=64)
    assert machine.run("tdpbf16ps %tmm6,%tmm5,%tmm0") == ""
    made = machine.tile(0).view(torch.float32).view(16, 16)
    machine.run("tilerelease")
    return made


def operands(a=(), b=(), c=0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A whose rows, and B whose columns, begin with the given numbers; the rest is 0."""
    left, right = torch.zeros(16, 32), torch.zeros(32, 16)
    left[:, : len(a)] = torch.tensor(a)
    right[: len(b)] = torch.tensor(b)[:, None]
    return left.bfloat16(), right.bfloat16(), torch.full((16, 16), c)


@built
@pytest.mark.parametrize(
    ("a", "b", "c", "made"),
    [
        ((2**-130,), (2.0**100,), 1.0, 1.0),  # a subnormal number of A is 0,
        ((2.0**100,), (2**-130,), 1.0, 1.0),  # of B,
        ((), (), 2.0**-140, 0.0),  # of C,
        ((2.0**-100,), (2.0**-40,), 0.0, 0.0),  # and so is a sum
        ((2.0**-126,), (1.0,), 0.0, 2.0**-126),  # this is none
        ((2.0**-100, 0.0, 2.0**-100), (2.0**-40, 0.0, 2.0**-26), 0.0, 2.0**-126),  # 2^-140 was 0 before 2^-126 came
        ((1.0,), (2.0**-24,), 1.0, 1.0),  # ties go to even,
        ((1.0,), (2.0**-24,), 1.0 + 2.0**-23, 1.0 + 2.0**-22),
        ((1.0, 1.0), (2.0**-24, 2.0**-24), 1.0, 1.0 + 2.0**-23),  # even and odd products are added before C is
        ((1.0, 0.0, 1.0), (1.0, 0.0, 2.0**-24), 0.0, 1.0),  # a chain rounds at each product
        ((1.0, 1.0, 1.0, 1.0), (1.0, 2.0**-24, 0.0, 2.0**-24), 0.0, 1.0 + 2.0**-23),  # of its own: odd ones meet first
        ((torch.inf,), (0.0,), 0.0, torch.nan),
        ((torch.inf,), (1.0,), 5.0, torch.inf),
        ((1.0,), (torch.nan,), 0.0, torch.nan),
        ((2.0**100,), (2.0**100,), 0.0, torch.inf),
    ],
)
def test_a_step_rounds_and_flushes_as_the_manual_has_it(machine, a, b, c, made):
    got = step(machine, *operands(a, b, c))
    assert torch.equal(got, torch.full((16, 16), made)) or (got.isnan().all() and made != made)


@built
def test_a_step_is_the_product(machine):
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(*shape, generator=generator) for shape in ((16, 32), (32, 16), (16, 16)))
    got = step(machine, a.bfloat16(), b.bfloat16(), c)
    exact = a.bfloat16().double() @ b.bfloat16().double() + c.double()
    assert (got.double() - exact).abs().max() < 1e-5


# ---- products in tiles, by the instructions themselves ----

PRODUCTS = """
import ctypes, sys
import torch
from tests import test_amx_emulation
assert ctypes.CDLL(sys.argv[1]).amx_start()
test_amx_emulation.check_products()
"""


def multiply(
    which: str, a: torch.Tensor, b: torch.Tensor, transposed: bool, c: torch.Tensor, add: bool, dim: int
) -> None:
    """C (+)= A B in whole tiles, B being a matrix or given as its transpose."""
    run = ctypes.CDLL(str(LIBRARY))[f"multiply_{which}"]
    run.restype = None
    numbers = [ctypes.c_int64(n) for n in (a.stride(0), a.shape[0] // 16, b.stride(0), a.shape[1], dim, c.stride(0))]
    depth = b.shape[1] if transposed else b.shape[0]
    run(
        ctypes.c_void_p(a.data_ptr()), numbers[0], numbers[1], ctypes.c_void_p(b.data_ptr()), numbers[2],
        ctypes.c_int64(depth), numbers[4], ctypes.c_bool(transposed), ctypes.c_bool(add),
        ctypes.c_void_p(c.data_ptr()), numbers[5],
    )  # fmt: skip


def fenced(shape: tuple[int, int], dtype: torch.dtype, stride: int) -> torch.Tensor:
    """Zeros whose last number is followed by memory that nobody may touch."""
    size = (shape[0] - 1) * stride + shape[1]
    width = dtype.itemsize
    pages = -(-size * width // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(whole.data_ptr() + pages * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    numbers = whole[pages * mmap.PAGESIZE - size * width : pages * mmap.PAGESIZE].view(dtype)
    return numbers.as_strided(shape, (stride, 1), numbers.storage_offset())


def check_products():
    """Products in 1 to 3 x 1 to 3 tiles of every depth: the same bits as the stand-in's, and close to fp64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(m, n, k) for m in (1, 2, 3) for n in (8, 16, 24, 32, 40) for k in (8, 24, 32, 40, 64, 96)]
    for number, (row_tiles, columns, depth) in enumerate(shapes):
        transposed, add = number % 2 == 0, number % 3 == 0
        padded = -(-depth // 32) * 32
        wide = -(-columns // 16) * 16
        a = fenced((16 * row_tiles, padded), torch.bfloat16, padded + number % 5)
        a[:, :depth] = torch.randn(16 * row_tiles, depth, generator=generator)
        b = fenced((columns, depth) if transposed else (depth, columns), torch.bfloat16, max(depth, columns) + 8)
        b[:] = torch.randn(b.shape, generator=generator)
        # bf16 has numbers that are subnormal, and so has fp32.
        a[0, :depth] *= 2.0**-130
        made = []
        start = torch.randn(16 * row_tiles, wide, generator=generator)
        start[1] *= 2.0**-130
        for which in ("amx_emulated", "avx2_amx"):
            c = fenced((16 * row_tiles, wide), torch.float32, wide + number % 3)
            c[:] = start
            multiply(which, a, b, transposed, c, add, columns)
            made.append(c)
        flushed = a.double().masked_fill(a.float().abs() < 2.0**-126, 0.0)[:, :depth]
        exact = flushed @ (b.T if transposed else b).double()
        bound = flushed.abs() @ (b.T if transposed else b).double().abs()
        if add:
            exact += start.masked_fill(start.abs() < 2.0**-126, 0.0).double()[:, :columns]
            bound += start.abs()[:, :columns]
        label = f"{16 * row_tiles} x {columns}, {depth} deep, transposed {transposed}, added {add}"
        assert torch.equal(*made), label
        assert ((made[0][:, :columns].double() - exact).abs() <= bound * (depth + 4) * 2.0**-24).all(), label
        assert add or not made[0][:, columns:].any(), label


@built
def test_products_in_tiles_are_those_of_the_matrices():
    done = on_an_instruction_set(None, "-c", PRODUCTS, str(LIBRARY))
    assert done.returncode == 0, done.stderr


# ---- attention ----

ATTENTION = """
import sys
import torch
from tests.test_amx_emulation import attend
assert torch.ops.mimkernels.cpu_isa() == sys.argv[2]
torch.save(attend(), sys.argv[1])
"""
# Queries, keys, features: tails of tiles, of 32 queries and 32 keys; several blocks of keys, several chunks of queries.
SHAPES = (
    (1, 1, 8), (16, 16, 32), (17, 15, 24), (31, 33, 40), (33, 47, 128), (50, 50, 64), (197, 197, 64), (40, 600, 16),
    (300, 340, 8),
)  # fmt: skip


def attend() -> list[torch.Tensor]:
    """Outputs and gradients of bf16 attention, of tensors whose last row is followed by memory nobody may touch."""
    made = []
    for number, (queries, keys, dim) in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(number)

        def draw(rows, columns, generator=generator):
            numbers = fenced((rows, columns), torch.bfloat16, columns)
            return numbers.copy_(torch.randn(rows, columns, generator=generator))[None, None]

        q, k, v, upstream = draw(queries, dim), draw(keys, dim), draw(keys, dim), draw(queries, dim)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        options = {}
        if number % 2:
            leaves.append(draw(queries, keys).detach().requires_grad_())
            options["bias"] = leaves[3][0]
        if number % 3 == 0 and keys > 1:
            options["key_mask"] = torch.rand(1, keys, generator=generator) < 0.8
        out = attention(*leaves[:3], **options, stats=("entropy",), backend="cpu")
        outputs = [out.out, out.lse, out.stats["entropy"]]
        ups = [upstream, *(torch.randn(out.lse.shape, generator=generator) for _ in range(2))]
        made += [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, ups)]
    return made


@built
def test_attention_by_the_instructions_has_the_bits_of_the_stand_in(tmp_path):
    made = []
    for isa in ("amx_emulated", "avx2_amx"):
        done = on_an_instruction_set(isa, "-c", ATTENTION, str(tmp_path / isa), isa)
        assert done.returncode == 0, done.stderr
        made.append(torch.load(tmp_path / isa))
    for a, b in zip(*made, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


COUNTED = """
import os
os.environ["MIMKERNELS_AMX_COUNTS"] = "1"
import torch
import mimkernels
q, k, v = (torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16) for _ in range(3))
mimkernels.attention(q, k, v, backend="cpu")
"""


@built
@pytest.mark.skipif(AMX_HERE, reason="this CPU has AMX: nothing is emulated")
def test_the_forward_takes_the_instructions_that_its_shape_asks_for():
    done = on_an_instruction_set("amx_emulated", "-c", COUNTED)
    assert done.returncode == 0, done.stderr
    counts = dict(line.split() for line in done.stderr.splitlines() if re.fullmatch(r"[a-z0-9]+ \d+", line))
    # S and P v: 4 x 4 tiles, 2 steps deep each; per step of 2 x 2 tiles as many loads as products.
    # Tiles are set up where tasks are counted and where they run.
    expected = {"ldtilecfg": 2, "tilerelease": 2, "tilezero": 32, "tileloadd": 64, "tilestored": 32, "tdpbf16ps": 64}
    assert {name: int(number) for name, number in counts.items()} == expected


# The first 16 bytes of the shapes of tiles, then rows of 64 bytes, then 16 rows of each.
LEFT = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
assert library.amx_start()
shapes = ctypes.create_string_buffer(b"\\1" + bytes(15) + b"\\x40\\0" * 8 + bytes(16) + b"\\x10" * 8 + bytes(8), 64)
for code in sys.argv[2:]:
    registers = (ctypes.c_uint64 * 16)(*[ctypes.addressof(shapes)] * 16)
    fault = ctypes.c_char_p()
    library.amx_execute(bytes.fromhex(code), registers, ctypes.byref(fault))
    assert not fault.value, fault.value
"""


@built
@pytest.mark.skipif(AMX_HERE, reason="this CPU has AMX: nothing is emulated")
@pytest.mark.parametrize("left", [False, True])
def test_tiles_that_are_left_set_up_end_the_process_with_a_message(left):
    codes = [CODES["ldtilecfg (%rdi)"], *([] if left else [CODES["tilerelease"]])]
    done = subprocess.run([sys.executable, "-c", LEFT, LIBRARY, *codes], capture_output=True, text=True)
    assert (done.returncode != 0) == left, done.stderr
    assert ("1 threads have left their tiles set up" in done.stderr) == left, done.stderr
