"""Every Triton kernel compiles ahead of time for each GPU generation, without spills, atomics or narrow accesses.

Those of attention have test_triton_attention_compile.py.
"""

import pytest

pytest.importorskip("triton")
import triton

from tests.compiled import triton_kernels, triton_resources
from tests.compiled.ops_aot import ARCHITECTURES, CASES
from tests.once import once

# 168 registers a thread leave room for 12 warps on a multiprocessor, enough loads in flight to fill its bandwidth.
MOST_REGISTERS = 168
# Bytes of shared memory of a block, on devices of compute capability 8.6, 8.9 and 12.0 too.
MOST_SHARED = 99 * 1024


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, list[dict] | str]:
    return once(tmp_path_factory, "triton-resources", triton_resources.read)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_within_their_resources(compiled, case, architecture):
    kernels = compiled[f"{case}-{architecture}"]
    assert not isinstance(kernels, str), kernels
    assert kernels
    for kernel in kernels:
        assert kernel["stack"] + kernel["local"] == 0, f"spills: {kernel}"
        assert kernel["registers"] <= MOST_REGISTERS, kernel
        assert kernel["shared"] <= MOST_SHARED, kernel
        assert not kernel["atomics"], kernel


@pytest.mark.parametrize("case", [name for name, row in CASES.items() if row[3]])
def test_memory_bound_kernels_move_16_bytes_at_a_time(compiled, case):
    for architecture in ARCHITECTURES:
        kernels = compiled[f"{case}-{architecture}"]
        assert any(kernel["wide"] for kernel in kernels), kernels


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_of_every_op_is_compiled(compiled, architecture):
    seen = {kernel["kernel"] for case in CASES for kernel in compiled[f"{case}-{architecture}"]}
    assert seen == triton_kernels.kernels(attention=False)


def test_the_table_is_of_these_sources(compiled):
    table = triton_resources.table()
    if not table:
        pytest.skip(f"the table is not of triton {triton.__version__}: every kernel was compiled")
    stale = sorted({name for name in {*compiled, *table} if compiled.get(name) != table.get(name)})
    assert not stale, f"{stale}: {triton_resources.RENEW}"
    assert set(triton_resources.ALWAYS) <= set(compiled)
