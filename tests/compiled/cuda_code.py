"""The machine code of a CUDA kernel's main loop, as cuobjdump prints it."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

from tests.compiled.cuda_resources import LIBRARY, find_cuobjdump, short_name


def functions(library: Path = LIBRARY) -> dict[str, dict[str, str]]:
    """The symbols of the library's kernels by architecture and by the name that ``short_name`` gives them."""
    command = [find_cuobjdump(), "--dump-resource-usage", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[str, str]] = {}
    for section in text.split("Fatbin elf code")[1:]:
        arch = re.search(r"arch = (\w+)", section)[1]
        symbols = re.findall(r"Function (\w+):", section)
        names = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True).stdout
        found.setdefault(arch, {}).update(zip(map(short_name, names.splitlines()), symbols, strict=True))
    return found


def instructions(symbol: str, arch: str, library: Path = LIBRARY) -> list[tuple[int, str]]:
    """Addresses and texts of a kernel's instructions."""
    command = [find_cuobjdump(), "-sass", "-arch", arch, "-fun", symbol, str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [(int(at, 16), code) for at, code in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?) ?;", text, re.M)]


def product_loops(code: list[tuple[int, str]]) -> list[Counter[str]]:
    """How often each opcode is in each innermost loop with matrix products, in their order in memory.

    A loop ends in a branch backwards.
    """
    places = {at: place for place, (at, _) in enumerate(code)}
    loops = {}
    for end, (at, text) in enumerate(code):
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)$", text)
        if branch is not None and int(branch[1], 16) < at:
            start = places[int(branch[1], 16)]
            bodies = [body for _, body in code[start : end + 1]]
            opcodes = Counter(re.sub(r"^@!?U?P\w+ ", "", body).split()[0].split(".")[0] for body in bodies)
            if opcodes["HMMA"]:
                loops[start, end] = opcodes
    inner = [
        (start, end)
        for start, end in sorted(loops)
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in loops)
    ]
    return [loops[place] for place in inner]


def main_loop(code: list[tuple[int, str]]) -> Counter[str]:
    """The shortest of the loops with matrix products."""
    return min(product_loops(code), key=Counter.total)
