"""A CPU with AVX-512 and bf16, emulated by Bochs, that runs functions of this very process.

Guest addresses are those of this process, so that a function reads and writes the tensors and the heap that it would.
Instructions come out as Intel's manual says, counted if wanted; nothing is known of time. ``pip install
bochscpu-python==0.3.1`` brings Bochs, on Linux for x86-64.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import tempfile
from importlib import import_module, metadata
from pathlib import Path

__all__ = ["VERSION", "Processor", "address"]

VERSION = "0.3.1"  # whose layout of hooks and whose list of models processor.cpp and model() know
REGISTERS = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()
GIB = 30
TABLES = 1 << 24  # where the guest's page tables are
STACK = 8 << 20
TRAP = bytes.fromhex("0fae3d00000000")  # clflush [rip]
RETURN = bytes.fromhex("41539dffe1")  # push r11; popf; jmp rcx


def address(function) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value


def mapped(size: int, **more) -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(-1, size, **more)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def compiled() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "processor.so"
        source = Path(__file__).with_suffix(".cpp")
        subprocess.run(["c++", "-std=c++20", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        return ctypes.CDLL(str(library))


class Processor:
    """Sapphire Rapids, one thread, as far as Bochs knows it; ``execute_tile`` adds AMX."""

    def __init__(self, execute_tile: int) -> None:
        if (found := metadata.version("bochscpu-python")) != VERSION:
            raise RuntimeError(f"bochscpu-python {VERSION} is needed, {found} is here")
        self.bochs = import_module("bochscpu")
        self.bochs_cpu = import_module("bochscpu.cpu")
        library = ctypes.CDLL(import_module("bochscpu._bochscpu").__file__)
        self.native = compiled()
        self.choose_model(library)
        self.session = self.bochs.Session()
        library.bochscpu_cpu_from.restype = ctypes.c_void_p
        self.put("cpu", library.bochscpu_cpu_from(0))
        for name, function in (
            ("page_insert", "mem_page_insert"),
            ("run", "cpu_run"),
            ("stop", "cpu_stop"),
            ("get_rip", "cpu_rip"),
            ("set_rip", "cpu_set_rip"),
            ("get_zmm", "cpu_zmm"),
            ("set_zmm", "cpu_set_zmm"),
        ):
            self.put(name, address(getattr(library, f"bochscpu_{function}")))
        for i, name in enumerate(REGISTERS):
            self.put("get_register", address(getattr(library, f"bochscpu_cpu_{name}")), i)
            self.put("set_register", address(getattr(library, f"bochscpu_cpu_set_{name}")), i)
        self.put("execute_tile", execute_tile)
        library.bochscpu_mem_missing_page(self.native.on_missing_page)

        self.memory, self.tables_at = mapped(8 * mmap.PAGESIZE)
        self.tables = (ctypes.c_uint64 * (8 * 512)).from_address(self.tables_at)
        insert = library.bochscpu_mem_page_insert
        for page in range(0, 8 * mmap.PAGESIZE, mmap.PAGESIZE):
            insert(ctypes.c_uint64(TABLES + page), ctypes.c_uint64(self.tables_at + page))
        self.used_tables = 1
        self.regions: dict[int, int] = {}  # GiB of this process -> GiB of the guest
        self.traps, traps_at = mapped(mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self.traps[:9] = TRAP + bytes.fromhex("ebfe")
        self.traps[64 : 64 + len(TRAP + RETURN)] = TRAP + RETURN
        self.put("traps_at", traps_at)
        self.traps_at = traps_at
        self.stack, stack_at = mapped(STACK)
        self.top = stack_at + STACK - mmap.PAGESIZE - 8  # as after a call
        threads = ctypes.CDLL(None)
        threads.pthread_self.restype = ctypes.c_uint64
        self.thread = threads.pthread_self
        self.fs = self.thread()
        self.native.call.argtypes = [ctypes.c_uint64] * 5
        self.follow_mappings()

    @staticmethod
    def choose_model(library: ctypes.CDLL) -> None:
        """The bindings make a Tiger Lake; let the function that describes one go on to that of Sapphire Rapids."""
        here = address(library._Z22create_tigerlake_cpuidP8BX_CPU_C)
        there = address(library._Z28create_sapphire_rapids_cpuidP8BX_CPU_C)
        jump = b"\x48\xb8" + there.to_bytes(8, "little") + b"\xff\xe0"  # mov rax, there; jmp rax
        writable(here, len(jump))
        ctypes.memmove(here, jump, len(jump))

    def put(self, name: str, value: int, index: int = 0) -> None:
        (ctypes.c_uint64 * (index + 1)).in_dll(self.native, name)[index] = value

    def counter(self, name: str) -> int:
        return ctypes.c_uint64.in_dll(self.native, name).value

    def follow_mappings(self) -> None:
        """Give the guest what this process has mapped since, and the state that calls begin with."""
        before = len(self.regions)
        for line in Path("/proc/self/maps").read_text().splitlines():
            first, last = (int(number, 16) for number in line.split()[0].split("-"))
            for gib in range(first >> GIB, (last - 1 >> GIB) + 1) if last <= 1 << 47 else ():
                if gib not in self.regions:
                    self.map(gib)
        if len(self.regions) != before:
            self.session.cpu.state = self.state()

    def map(self, gib: int) -> None:
        top, entry = gib >> 9, gib & 511
        if self.tables[top] == 0:
            if self.used_tables == 8:
                raise RuntimeError("this process is spread over too much of its address space")
            self.tables[top] = TABLES + self.used_tables * mmap.PAGESIZE | 0x7  # present, writable, user
            self.used_tables += 1
        table = (self.tables[top] - TABLES) // mmap.PAGESIZE
        guest = len(self.regions) + 8  # above the addresses of devices
        self.tables[512 * table + entry] = guest << GIB | 0x87  # a page of 1 GiB
        self.regions[gib] = guest
        self.put("region_of", gib + 1, guest)

    def state(self):
        """64-bit mode, all vector registers switched on, traps for system calls, this thread's own variables."""
        state = self.bochs.State()
        self.bochs_cpu.set_long_mode(state)
        state.cr0 = 0x80050033
        state.cr4 = 0x50620  # PAE, OSFXSR, OSXMMEXCPT, FSGSBASE, OSXSAVE
        state.xcr0 = 0xE7
        state.cr3 = TABLES
        state.rflags, state.mxcsr, state.mxcsr_mask = 0x2, 0x1F80, 0xFFFF
        state.fpcw, state.fptw = 0x37F, 0
        state.star, state.lstar, state.sfmask = 0x10 << 32, self.traps_at + 64, 0

        def segment(selector: int, attributes: int, base: int = 0):
            made = self.bochs.Segment()
            made.present, made.selector, made.base = True, selector, base
            made.limit, made.attr = 0xFFFFFFFF, attributes
            return made

        state.cs = segment(0x10, 0xA09B)
        state.ds = state.es = state.ss = state.gs = segment(0x18, 0xC093)
        state.fs = segment(0x18, 0xC093, self.fs)
        return state

    def call(self, function: int, *arguments: int) -> None:
        """function(up to three integers); the process ends where it does not return."""
        if self.thread() != self.fs:
            raise RuntimeError("another thread calls the emulated CPU")
        self.follow_mappings()
        if self.native.call(function, *arguments, *[0] * (3 - len(arguments)), self.top):
            raise SystemExit("wide_cpu: a function did not return")


def writable(at: int, size: int) -> None:
    """Let this process change its code."""
    page = at & -mmap.PAGESIZE
    everything = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(at + size - page), everything) != 0:
        raise OSError(f"the code at {at:#x} cannot be changed")
