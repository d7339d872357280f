"""Lets the ops of this process run another instruction set's kernels on the emulated CPU."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

from mimkernels.ops import _native
from tests.wide_cpu.processor import Processor, address, writable

ROOT = Path(__file__).resolve().parents[2]
ISAS = ("avx512", "avx512_bf16", "amx_bf16")
# Scatters, which GCC makes of the inverse of a permutation, are unknown to Bochs: these stay on this CPU.
NOT_EMULATED = ("random_mask", "mask_from_noise")
CONVERT_TWO = 0x72, 0x73  # processor.cpp says what for
KERNEL = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)


def output_of(*command: str | Path) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


class Kernels:
    """The kernels of ``isa``, in place of those that were chosen for this CPU, for the main thread of this process."""

    def __init__(self, isa: str) -> None:
        if os.environ.get("LD_BIND_NOW") is None:
            raise RuntimeError("start Python with LD_BIND_NOW=1: the loader saves the registers of this CPU alone")
        torch.set_num_threads(1)
        torch.ops.mimkernels.cpu_isa()  # the table is chosen here, by this CPU
        self.library = _native.library("cpu").path
        lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(self.library.name)]
        self.base = min(int(line.partition("-")[0], 16) for line in lines)
        self.symbols = {
            name: self.base + int(value, 16)
            for value, _, name in (line.split(" ", 2) for line in output_of("nm", "-C", "--defined-only", self.library))
        }
        self.processor = Processor(self.symbol("::amx::execute(unsigned char const*, unsigned long const (&) [16])"))
        self.calls: Counter[str] = Counter()
        self.take_over_conversions(isa)
        self.take_over_memory()

        definitions = (ROOT / "csrc" / "kernels.def").read_text()
        names = ["_".join(found) for found in re.findall(r"^MIMKERNELS_KERNEL\((\w+), (\w+),", definitions, re.M)]
        table = ctypes.c_uint64 * (1 + len(names))
        wide = table.from_address(self.symbol(f"{isa}::kernel_table", f"::{isa}_table"))
        chosen = ctypes.c_uint64.from_address(self.symbol("cpu_kernels()::chosen"))
        here = table.from_address(chosen.value)
        self.made = [
            None if name.startswith(NOT_EMULATED) else self.emulated(name, wide[1 + i]) for i, name in enumerate(names)
        ]
        kept = zip(self.made, list(here)[1:], strict=True)
        self.table = table(wide[0], *(native if made is None else address(made) for made, native in kept))
        chosen.value = ctypes.addressof(self.table)
        object.__setattr__(_native.library("cpu"), "isa", isa)

    def symbol(self, *ends: str) -> int:
        found = {at for name, at in self.symbols.items() if name.endswith(ends) and not name.startswith("guard")}
        if len(found) != 1:
            raise RuntimeError(f"{len(found)} symbols of {self.library.name} end in {' or '.join(ends)}")
        return found.pop()

    def emulated(self, name: str, kernel: int):
        loop = address(self.processor.native.last_first)

        def call(status: int, params: int, parallel_for: int) -> int:
            try:
                self.processor.call(kernel, status, params, loop)
            except BaseException as error:
                # Nothing may be thrown through the op that called.
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                os._exit(3)
            self.calls[name] += 1
            return status

        return KERNEL(call)

    def take_over_conversions(self, isa: str) -> None:
        """Let the conversions of two registers to bf16, in what is emulated, be executed by processor.cpp."""
        inside = False
        for line in output_of("objdump", "-d", "-C", "-w", self.library):
            if line.endswith(">:"):
                inside = f"mimkernels::{isa}::" in line
            elif inside and "vcvtne2ps2bf16" in line:
                at = self.base + int(line.partition(":")[0], 16)
                code = (ctypes.c_uint8 * 6).from_address(at)
                writable(at, len(code))
                if code[4] != CONVERT_TWO[0]:
                    raise RuntimeError(f"no conversion: {line}")
                code[4] = CONVERT_TWO[1]

    def take_over_memory(self) -> None:
        """Let the library allocate what it works with from processor.cpp."""
        native = self.processor.native
        native.take.restype = ctypes.c_void_p
        memory = native.take(ctypes.c_uint64(64), ctypes.c_uint64(64))  # the pool is there now
        native.give_back(ctypes.c_void_p(memory))
        for line in output_of("objdump", "-R", self.library):
            for name, function in (("aligned_alloc", native.take), ("free", native.give_back)):
                if f" {name}@" in line or line.endswith(f" {name}"):
                    at = self.base + int(line.partition(" ")[0], 16)
                    writable(at, 8)
                    ctypes.c_uint64.from_address(at).value = address(function)

    def counter(self, name: str) -> int:
        return self.processor.counter(name)

    def runs_of(self, body) -> list[tuple[int, str, list[str]]]:
        """How often each straight run of instructions of the kernels that ``body()`` calls is executed, and in what."""
        visits = (ctypes.c_uint64 * (self.library.stat().st_size + (1 << 20)))()  # by address
        where = {"visits_from": self.base, "visits_size": len(visits), "visits": ctypes.addressof(visits)}
        for name, value in where.items():
            ctypes.c_uint64.in_dll(self.processor.native, name).value = value
        self.count(body)
        ctypes.c_uint64.in_dll(self.processor.native, "visits").value = 0
        runs: list[tuple[int, str, list[str]]] = []
        function = ""
        for line in output_of("objdump", "-d", "-C", "-w", "--no-show-raw-insn", self.library):
            if line.endswith(">:"):
                function = line.partition("<")[2][:-2]
            at, found, instruction = line.partition(":\t")
            times = visits[int(at, 16)] if found else 0
            if not runs or (times, function) != runs[-1][:2]:
                runs.append((times, function, []))
            runs[-1][2].append(instruction.strip())
        return [run for run in runs if run[0]]

    def count(self, body) -> int:
        """Instructions of the kernels that ``body()`` calls, all of a loop in one range."""
        switch = ctypes.c_int.in_dll(self.processor.native, "count_instructions")
        ranges = ctypes.c_int64.in_dll(self.processor.native, "most_ranges")
        before, kept = self.counter("instructions"), ranges.value
        switch.value, ranges.value = 1, 1
        body()
        switch.value, ranges.value = 0, kept
        return self.counter("instructions") - before
