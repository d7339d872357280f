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


def main_loop(code: list[tuple[int, str]]) -> Counter[str]:
    """How often each opcode is in the shortest loop with matrix products; a loop ends in a branch backwards."""
    places = {at: place for place, (at, _) in enumerate(code)}
    loops = []
    for end, (at, text) in enumerate(code):
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)$", text)
        if branch is not None and int(branch[1], 16) < at:
            loops.append([body for _, body in code[places[int(branch[1], 16)] : end + 1]])
    opcodes = (Counter(re.sub(r"^@!?U?P\w+ ", "", body).split()[0].split(".")[0] for body in loop) for loop in loops)
    return min((loop for loop in opcodes if loop["HMMA"]), key=Counter.total)
