"""No CUDA kernel takes more registers or spills more than tests/cuda_resources.json states."""

import json

import pytest

from tests import cuda_resources
from tests.cuda_resources import LIBRARY

TABLE = json.loads(cuda_resources.TABLE.read_text())
KERNELS = TABLE["kernels"]
REGENERATE = "python -m tests.cuda_resources writes the table anew"

built = pytest.mark.skipif(
    not LIBRARY.exists() or cuda_resources.find_cuobjdump() is None, reason="no CUDA library here, or no cuobjdump"
)


@pytest.fixture(scope="module")
def report():
    return cuda_resources.read_report()


@built
def test_the_table_has_every_kernel_and_no_other(report):
    assert {arch: set(kernels) for arch, kernels in report.items()} == {
        arch: set(kernels) for arch, kernels in KERNELS.items()
    }, REGENERATE


@built
@pytest.mark.parametrize("arch", KERNELS)
def test_no_kernel_takes_more_than_the_table_states(report, arch):
    nvcc = json.loads((LIBRARY.parent / "build.json").read_text())["nvcc"]
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
def test_nothing_spills_but_the_backward_of_attention(arch):
    assert not [name for name, row in KERNELS[arch].items() if row["stack"] and "attention_bwd" not in name]


@pytest.mark.parametrize("arch", KERNELS)
def test_the_stated_occupancy_follows(arch):
    for name, row in KERNELS[arch].items():
        blocks = cuda_resources.occupancy(arch, row["registers"], row["threads"], row["shared"])
        assert row["blocks"] == blocks, name
        assert blocks >= 1, f"{name} does not fit a multiprocessor"


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
