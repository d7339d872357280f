"""Machine code of the poolings on tensor cores: what the inner loops load and multiply, by cuobjdump."""

import re
import subprocess
from collections import Counter

import pytest

from tests.compiled import cuda_resources

# Of the loop that multiplies, per 16 tokens: over 64 features and 32 vectors, or over 64 columns and 32 vectors (of two
# terms). Words of 16 bytes; none of them goes through shared memory.
LOOPS = {
    # x as left operand, 4 words; 2 words of each 8 vectors; two products for every word of a vector.
    "matrix_dots_kernel<{type}, 32>": {"LDG.128": 4 + 8, "HMMA": 16},
    # x as right operand, 4 words; 2 x 2 groups of 16 vectors by 8 tokens, a product for each 8 columns.
    "matrix_weigh_kernel<{type}, 32, {type}>": {"LDG.128": 4, "HMMA": 4 * 8},
    "matrix_weigh_kernel<{type}, 32, float>": {"LDG.128": 4, "HMMA": 4 * 8},
    # Vectors as right operand, 8 words of each term, for the first tokens alone; a weight of 4 bytes for each of 32
    # vectors and 16 tokens and lane.
    "matrix_spread_kernel<{type}, 32, 2>": {"LDG.128": 16, "LDG": 32, "HMMA": 2 * 4 * 8},
}
ELEMENT = "__nv_bfloat16"

pytestmark = pytest.mark.skipif(
    not cuda_resources.built_for(), reason="no CUDA library with machine code is built here"
)


def dump(*options: str) -> str:
    command = [cuda_resources.find_cuobjdump(), *options, str(cuda_resources.LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def symbols() -> dict[str, str]:
    """Symbols of the kernels by their short names."""
    found = re.findall(r"Function (\S*matrix_\S*):", dump("--dump-resource-usage"))
    names = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True).stdout
    return dict(zip(map(cuda_resources.short_name, names.splitlines()), found, strict=True))


def inner_loop(code: str) -> Counter:
    """Instructions of the shortest loop that multiplies; wide loads and stores by their width."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@\S+ )?(\S+)([^;]*);", code)
    instructions = [(int(address, 16), name, operands) for address, name, operands in lines]
    loops = []
    for place, (address, name, operands) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        if name.split(".")[0] == "BRA" and target and int(target[1], 16) < address:
            start = int(target[1], 16)
            loops.append([name for at, name, _ in instructions[: place + 1] if at >= start])
    body = min((loop for loop in loops if any("HMMA" in name for name in loop)), key=len)
    return Counter(name.split(".")[0] + ".128" * (".128" in name) for name in body)


@pytest.mark.parametrize("kernel", LOOPS)
def test_the_loop_of_many_vectors(symbols, kernel):
    for arch in cuda_resources.built_for():
        counts = inner_loop(dump("-arch", arch, "-sass", "-fun", symbols[kernel.format(type=ELEMENT)]))
        expected = LOOPS[kernel]
        assert {name: counts[name] for name in expected} == expected, arch
        assert not {"LDS", "LDS.128", "LDSM", "STS", "BAR", "LDL", "STL"} & set(counts), (arch, counts)
