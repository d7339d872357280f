"""The tree by which compiled Triton kernels add rows loses nothing; the interpreted ones add in fp64 instead."""

import pytest
import torch

from mimkernels.testing import DEVICE

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
_triton = pytest.importorskip("mimkernels.ops._triton")


@triton.jit
def tree_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    cols = tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + cols[None, :])
    total, lost = tl.reduce((x, tl.zeros([ROWS, COLUMNS], dtype=tl.float32)), 0, _triton.add_sums)
    tl.store(out_ptr + cols, total)
    tl.store(out_ptr + COLUMNS + cols, lost)


def test_the_tree_of_compiled_kernels_loses_nothing():
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    out = torch.empty(2, 4, device=DEVICE)
    tree_kernel[(1,)](x, out, ROWS=32, COLUMNS=4)
    assert (out.double().sum(0) - x.double().sum(0)).abs().max().item() < 1e-12
