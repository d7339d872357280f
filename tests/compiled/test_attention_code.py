"""The machine code of attention's kernels: what the main loops load for their products of matrices."""

import pytest

from tests.compiled import cuda_code, cuda_resources

pytestmark = [
    pytest.mark.skipif(not cuda_resources.built_for(), reason="no CUDA library with machine code is built here"),
    pytest.mark.skipif(cuda_resources.find_cuobjdump() is None, reason="no cuobjdump to read the CUDA library with"),
]

LOADS = ("LDG", "LDL", "STL", "LDGSTS", "LD", "ST")  # of global and local memory


@pytest.fixture(scope="module")
def symbols():
    return cuda_code.functions()


def code_of(symbols, name):
    arch = "sm_90a" if "sm_90a" in symbols else next(iter(symbols))
    return cuda_code.instructions(symbols[arch][name], arch)


def loop_of(symbols, name):
    return cuda_code.main_loop(code_of(symbols, name))


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


# Backward of a whole head per block. S, dP, dV and dK of 16 queries by the 16 keys of each of a warp's strips take
# dim / 2 products, of which q and dout are loaded twice, once transposed, for all strips; k once for each, unless one
# strip's is kept. dQ takes dS once and k for each 32 features. At 64 features that is 18 loads to 40 products.
@pytest.mark.parametrize(("dim", "strips"), [(32, 1), (64, 2)])
@pytest.mark.parametrize("coef", [False, True], ids=["plain", "statistics"])
def test_five_products_of_the_gradients_take_few_loads(symbols, dim, strips, coef):
    name = f"attention_bwd_heads_kernel<__nv_bfloat16, {dim}, {str(coef).lower()}>"
    code = code_of(symbols, name)
    products, *of_queries = cuda_code.product_loops(code)
    assert products["HMMA"] == strips * dim // 2
    assert products["LDSM"] == dim // 4 + (strips * dim // 16 if strips > 1 else 0)
    assert of_queries
    for loop in of_queries:
        assert loop["LDSM"] * 4 == loop["HMMA"] * 3
        assert loop["LDS"] == 0
    for loop in (products, *of_queries):
        assert {name: loop[name] for name in LOADS if loop[name]} == {}  # lse, delta and coefficients: before the loops
        assert loop["BAR"] == 0
    if not coef:
        assert products["LDS"] == 6  # lse, its low part and delta of a lane's four queries
    assert not [text for _, text in code if "STL" in text or "LDL" in text]  # nothing spills


def test_the_gradients_in_two_passes_take_more(symbols):
    for loop in cuda_code.product_loops(code_of(symbols, "attention_bwd_kernel<__nv_bfloat16, 64>")):
        assert loop["LDSM"] * 40 > loop["HMMA"] * 18 * 1.5
