"""No CUDA kernel takes more registers or spills more than tests/compiled/cuda_resources.json states."""

import json

import pytest

from tests.compiled import cuda_resources
from tests.compiled.cuda_resources import LIBRARY

TABLE = json.loads(cuda_resources.TABLE.read_text())
KERNELS = TABLE["kernels"]
REGENERATE = "python -m tests.compiled.cuda_resources writes the table anew"

built = pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library is not built here")
has_code = pytest.mark.skipif(not cuda_resources.built_for(), reason="no CUDA library with machine code is built here")


@pytest.fixture(scope="module")
def report():
    assert cuda_resources.find_cuobjdump() is not None, "the CUDA library is here, but no cuobjdump to read it with"
    return cuda_resources.read_report()


@has_code
def test_the_table_has_every_kernel_and_no_other(report):
    assert set(report) == set(cuda_resources.built_for()) <= set(KERNELS)
    assert {arch: set(kernels) for arch, kernels in report.items()} == {
        arch: set(kernels) for arch, kernels in KERNELS.items() if arch in report
    }, REGENERATE


@built
def test_the_table_is_of_these_sources_and_tests():
    assert TABLE["sources"] == cuda_resources.sources(), REGENERATE
    assert TABLE["code_tests"] == cuda_resources.code_tests(), REGENERATE


@has_code
@pytest.mark.parametrize("arch", KERNELS)
def test_no_kernel_takes_more_than_the_table_states(report, arch):
    nvcc = json.loads((LIBRARY.parent / "build.json").read_text())["nvcc"]
    if arch not in report:
        pytest.skip(f"the library is built for {', '.join(report)} alone")
    if nvcc != TABLE["nvcc"]:
        pytest.skip(f"the table is of nvcc {TABLE['nvcc']}, the library of {nvcc}")
    more = {
        name: (what, usage[what], KERNELS[arch][name][what])
        for name, usage in report[arch].items()
        for what in ("registers", "stack")
        if usage[what] > KERNELS[arch][name][what]
    }
    assert not more, f"(kernel: what, now, in the table) {more}; {REGENERATE}"


@pytest.mark.parametrize("arch", KERNELS)
def test_nothing_spills_but_attention_backward_in_two_passes(arch):
    assert not [name for name, row in KERNELS[arch].items() if row["stack"] and "attention_bwd_kernel" not in name]


# Attention of 16 bits, forward, by features of a head: blocks of 4 warps, as strips_blocks asks for.
@pytest.mark.parametrize("arch", KERNELS)
def test_attention_with_queries_in_registers_has_the_blocks_it_was_designed_for(arch):
    plain = {32: 4, 64: 3, 96: 3, 128: 2 if arch == "sm_80" else 3}  # of sm_80, shared memory has room for two
    for type_ in ("__half", "__nv_bfloat16"):
        for dim, blocks in plain.items():
            assert KERNELS[arch][f"attention_fwd_strips_kernel<{type_}, {dim}, false>"]["blocks"] == blocks, REGENERATE
            assert KERNELS[arch][f"attention_fwd_strips_kernel<{type_}, {dim}, true>"]["blocks"] >= 2, REGENERATE


@pytest.mark.parametrize("arch", KERNELS)
def test_every_kernel_fits_a_multiprocessor(arch):
    for name, row in KERNELS[arch].items():
        assert cuda_resources.occupancy(arch, row["registers"], row["threads"], row["shared"]) >= 1, name


def test_the_table_states_what_the_launchers_take():
    launches = cuda_resources.launches()
    for kernels in KERNELS.values():
        for name, row in kernels.items():
            expected = launches.get(name, (cuda_resources.THREADS, 0))
            assert (row["threads"], row["shared"]) == expected, f"{name}: {REGENERATE}"


def test_heads_of_197_tokens_fit_in_shared_memory_at_once():
    heads = {name: shared for name, (_, shared) in cuda_resources.launches().items() if "bwd_heads" in name}
    assert len(heads) == 8  # of two types, 32 and 64 features, with and without coefficients
    assert all(100 * 1024 < shared <= 163 * 1024 for shared in heads.values()), heads


def test_occupancy_of_known_kernels():
    # 168 registers leave 12 warps to a multiprocessor, 128 leave 16, 255 leave 8.
    assert cuda_resources.occupancy("sm_80", 168, 128, 0) == 3
    assert cuda_resources.occupancy("sm_80", 128, 256, 0) == 2
    assert cuda_resources.occupancy("sm_80", 128, 224, 0) == 2
    assert cuda_resources.occupancy("sm_80", 255, 128, 0) == 2
    # 163 KiB hold one block of 99 KiB, or three of 53.
    assert cuda_resources.occupancy("sm_80", 32, 128, 99 * 1024) == 1
    assert cuda_resources.occupancy("sm_80", 32, 128, 53 * 1024) == 3
    assert cuda_resources.occupancy("sm_90a", 32, 1024, 0) == 2
