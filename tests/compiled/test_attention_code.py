"""The machine code of attention's forward kernels: what the main loop loads for its products of matrices."""

import pytest

from tests.compiled import cuda_code, cuda_resources

pytestmark = [
    pytest.mark.skipif(not cuda_resources.LIBRARY.exists(), reason="the CUDA library is not built here"),
    pytest.mark.skipif(cuda_resources.find_cuobjdump() is None, reason="no cuobjdump to read the CUDA library with"),
]

LOADS = ("LDG", "LDL", "STL", "LDGSTS", "LD", "ST")  # of global and local memory


@pytest.fixture(scope="module")
def symbols():
    return cuda_code.functions()


def loop_of(symbols, name):
    arch = "sm_90a" if "sm_90a" in symbols else next(iter(symbols))
    return cuda_code.main_loop(cuda_code.instructions(symbols[arch][name], arch))


# Per 16 queries by 16 keys: dim / 16 steps of two products for scores, dim / 8 products for outputs. What is loaded of
# keys and of values serves both strips of a warp, up to 64 features.
@pytest.mark.parametrize(("dim", "strips"), [(32, 2), (64, 2), (96, 1), (128, 1)])
@pytest.mark.parametrize("full", [False, True], ids=["plain", "statistics"])
def test_16_queries_by_16_keys_take_few_loads(symbols, dim, strips, full):
    loop = loop_of(symbols, f"attention_fwd_strips_kernel<__nv_bfloat16, {dim}, {str(full).lower()}>")
    groups, rest = divmod(loop["HMMA"], dim // 4)
    assert (groups, rest) == (4, 0)  # 32 queries by 32 keys, or 16 by 64
    assert loop["LDSM"] == groups * dim // 8 // strips
    assert {name: loop[name] for name in LOADS if loop[name]} == {}
    assert loop["BAR"] == 0
    if not full:
        assert loop["LDS"] == 0
