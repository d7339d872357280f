"""What every CUDA kernel takes of a multiprocessor, as the compiler reports it.

`python -m tests.compiled.cuda_resources` reads the built library and writes cuda_resources.json beside this file, which
the tests compare the next build with. Tests of the machine code must pass before. The table has a digest of what nvcc
read, and one of these tests. Where both are unchanged, which `--unchanged` answers, machine code has nothing to add to
the table, and `.ci/run` has nvcc write PTX alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIBRARY = ROOT / "mimkernels" / "_lib" / "libmimkernels_cuda.so"
TABLE = HERE / "cuda_resources.json"
CODE_TESTS = ("cuda_code.py", "test_attention_code.py", "test_cuda_pooling_code.py")  # with what they share

# Of one multiprocessor: shared memory (of which the system takes 1 KiB per block), registers, warps, blocks.
SHARED = {"sm_80": 164 * 1024, "sm_90a": 228 * 1024, "sm_100": 228 * 1024}
REGISTERS = 64 * 1024
WARPS = 64
BLOCKS = 32

TOKENS = 197  # queries and keys of the launches whose occupancy is stated
THREADS = 256  # of a block of any kernel that is not named below; it takes no dynamic shared memory

# Threads and shared memory of the attention kernels, and of the one-pass pooling at its widest tokens, from the
# functions that their launchers call.
LAUNCHES = """
#include <cstdio>
#include <initializer_list>
#include "cuda/attention/tiling.h"
#include "cuda/pooling/token_pool_tiling.h"
#include "ops/attention/cuda/head_tiling.h"
using namespace mimkernels;
using namespace mimkernels::cuda;
void print(const char* kernel, const char* type, const char* rest, int threads, int bytes) {
  std::printf("%s<%s%s> %d %d\\n", kernel, type, rest, threads, bytes);
}
int main() {
  for (const char* type : {"float", "__half", "__nv_bfloat16"}) {
    const int size = type[0] == 'f' ? 4 : 2;
    for (int dim : {32, 64, 96, 128}) {
      char rest[32];
      for (bool stats : {false, true}) {
        std::snprintf(rest, sizeof(rest), ", %d, %s", dim, stats ? "true" : "false");
        const StripTiling tiling = forward_tiling(TOKENS, TOKENS, dim, size, stats);
        print("attention_fwd_kernel", type, rest, 32 * tiling.warps(), tiling.shared_bytes);
        if (size == 2) {
          AttentionScores scores;
          scores.queries = scores.keys = TOKENS;
          Positions positions;
          positions.given = true;
          positions.dims = 2;
          const StripTiling strips = strips_tiling(scores, positions, dim, size, stats);
          print("attention_fwd_strips_kernel", type, rest, 32 * strips.warps(), strips.shared_bytes);
        }
      }
      std::snprintf(rest, sizeof(rest), ", %d", dim);
      const StripTiling tiling = backward_tiling(TOKENS, TOKENS, dim, size);
      print("attention_bwd_kernel", type, rest, 32 * tiling.warps(), tiling.shared_bytes);
    }
    for (int dim : {32, 64}) {
      for (bool coef : {false, true}) {
        if (size == 4) continue;
        char rest[32];
        std::snprintf(rest, sizeof(rest), ", %d, %s", dim, coef ? "true" : "false");
        const HeadTiling tiling = head_tiling(TOKENS, TOKENS, dim, coef, 2 * coef, 163 * 1024);
        print("attention_bwd_heads_kernel", type, rest, tiling.threads(), tiling.shared_bytes);
      }
    }
    const BiasTiling bias = bias_tiling(TOKENS, TOKENS, 64, size);
    print("attention_dbias_kernel", type, "", 32 * bias.warps(), bias.shared_bytes);
    print("lse_low_kernel", type, "", 32 * kLowWarps, low_shared_bytes(64, size));
    const StripTiling received = received_tiling(TOKENS, TOKENS, 64, size);
    print("received_attention_kernel", type, "", 32 * received.warps(), received.shared_bytes);
    const DivergenceTiling divergence(64, size);
    print("head_divergence_kernel", type, "", 32 * divergence.warps, divergence.shared_bytes);
    for (int words : {2, 4, 6, 8}) {
      for (int queries : {1, 2, 4}) {
        char rest[32];
        std::snprintf(rest, sizeof(rest), ", %d, %d", words, queries);
        const int bytes = pool_chunk_bytes(queries, words * 32 * 16 / size, words * 32);
        print("pool_chunk_kernel", type, rest, 32 * kPoolWarps, bytes);
      }
    }
    for (int vectors : {16, 32}) {
      if (size == 4) continue;
      char rest[32];
      std::snprintf(rest, sizeof(rest), ", %d", vectors);
      print("matrix_dots_kernel", type, rest, 32 * kMatrixWarps, 0);
      for (const char* out : {type, "float"}) {
        std::snprintf(rest, sizeof(rest), ", %d, %s", vectors, out);
        print("matrix_weigh_kernel", type, rest, 32 * kMatrixWarps, 0);
      }
      for (int terms : {1, 2}) {
        std::snprintf(rest, sizeof(rest), ", %d, %d", vectors, terms);
        print("matrix_spread_kernel", type, rest, 32 * kMatrixWarps, 0);
      }
    }
  }
}
"""


def find_cuobjdump() -> str | None:
    """The CUDA toolkit's, or the one that comes with Triton."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(beside) if beside.exists() else None
    return found


def read_report(library: Path = LIBRARY) -> dict[str, dict[str, dict[str, int]]]:
    """Registers and bytes of stack (spills, for the most part) of each kernel, by architecture."""
    command = [find_cuobjdump(), "--dump-resource-usage", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = subprocess.run(["c++filt"], input=text.replace(":\n", " :\n"), capture_output=True, text=True).stdout
    report: dict[str, dict[str, dict[str, int]]] = {}
    for section in text.split("Fatbin elf code")[1:]:
        arch = re.search(r"arch = (\w+)", section)[1]
        for name, registers, stack in re.findall(r"Function (.*) :\n\s*REG:(\d+) STACK:(\d+)", section):
            usage = {"registers": int(registers), "stack": int(stack)}
            report.setdefault(arch, {})[short_name(name)] = usage
    return report


def short_name(name: str) -> str:
    """``gather_tokens_dx_kernel<__half, 8>`` of the demangled signature."""
    for noise in ("(anonymous namespace)::", "mimkernels::cuda::", "(mimkernels::ReduceKind)", "(int)", "(bool)"):
        name = name.replace(noise, "")
    return name.removeprefix("void ").split("(")[0]


def launches() -> dict[str, tuple[int, int]]:
    """Threads of a block and bytes of dynamic shared memory of the kernels that LAUNCHES names, at TOKENS tokens."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "launches"
        command = [
            "c++",
            "-std=c++20",
            f"-I{ROOT / 'csrc'}",
            f"-DTOKENS={TOKENS}",
            "-x",
            "c++",
            "-",
            "-o",
            program,
        ]
        subprocess.run(command, input=LAUNCHES, text=True, check=True)
        lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: (int(threads), int(size)) for name, threads, size in (line.rsplit(" ", 2) for line in lines)}


def occupancy(arch: str, registers: int, threads: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at a time."""
    warps = -(-threads // 32)
    # Each quarter of a multiprocessor gives its own registers, in units of 8 per thread of a warp.
    by_registers = REGISTERS // 4 // (-(-registers // 8) * 8 * 32) * 4 // warps
    return min(by_registers, SHARED[arch] // (shared + 1024), WARPS // warps, BLOCKS)


def sources() -> str:
    """A digest of the kernels' files, of all that they include, and of how CMake compiles them."""
    csrc = ROOT / "csrc"
    waiting, seen = sorted(csrc.rglob("*.cu")), set()
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen.add(file)
            named = re.findall(r'^\s*#\s*include\s+"([^"]+)"', file.read_text(), re.M)
            found = (path for name in named for path in (csrc / name, file.parent / name) if path.exists())
            waiting += (path.resolve() for path in found)
    section = re.search(r"^# ---- CUDA -.*?^# ----", (ROOT / "CMakeLists.txt").read_text(), re.M | re.S)[0]
    texts = [section, *(f"{file.relative_to(csrc)}\n{file.read_text()}" for file in sorted(seen))]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def code_tests() -> str:
    """A digest of the tests of machine code, which passed when the table was written."""
    return hashlib.sha256("\n".join((HERE / name).read_text() for name in CODE_TESTS).encode()).hexdigest()[:16]


def built_for() -> list[str]:
    """The architectures that the built library, if there is one, has machine code for, as cuobjdump names them."""
    if not LIBRARY.exists():
        return []
    build = json.loads((LIBRARY.parent / "build.json").read_text())
    names = build["cuda_architectures"].split()
    return [f"sm_{name.removesuffix('-real')}" for name in names if not name.endswith("-virtual")]


def unchanged() -> bool:
    """Whether the table is of these sources, of these tests of machine code, and of the nvcc that is found."""
    nvcc = shutil.which("nvcc")
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    table = json.loads(TABLE.read_text())
    return f"V{table['nvcc']}" in told.split() and (table["sources"], table["code_tests"]) == (sources(), code_tests())


def make_table() -> dict:
    """The table as it is committed."""
    known = launches()
    build = json.loads((LIBRARY.parent / "build.json").read_text())
    assert built_for() == list(SHARED), f"the library is built for {built_for()} alone: rebuild it for {list(SHARED)}"
    table: dict = {"nvcc": build["nvcc"], "sources": sources(), "code_tests": code_tests(), "tokens": TOKENS}
    table["kernels"] = {}
    for arch, kernels in read_report().items():
        for name, usage in sorted(kernels.items()):
            threads, shared = known.get(name, (THREADS, 0))
            blocks = occupancy(arch, usage["registers"], threads, shared)
            row = {**usage, "threads": threads, "shared": shared, "blocks": blocks}
            table["kernels"].setdefault(arch, {})[name] = row
    return table


def write_table() -> None:
    """Write the table, unless the tests of machine code fail."""
    table = make_table()
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", *(str(HERE / name) for name in CODE_TESTS)])
    if run.returncode:
        sys.exit("the table is not written: a test of machine code failed")
    lines = []
    for arch, kernels in table["kernels"].items():
        rows = ",\n".join(f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in kernels.items())
        lines.append(f'  "{arch}": {{\n{rows}\n  }}')
    head = "".join(f' "{key}": {json.dumps(table[key])},\n' for key in ("nvcc", "sources", "code_tests", "tokens"))
    TABLE.write_text("{\n" + head + ' "kernels": {\n' + ",\n".join(lines) + "\n }\n}\n")


if __name__ == "__main__":
    sys.exit(not unchanged()) if "--unchanged" in sys.argv else write_table()
