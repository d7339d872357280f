"""Without a GPU, Triton runs in its interpreter; that must be decided before triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


@pytest.fixture
def poisoned():
    """Fresh tensors hold NaN (or the largest integer), so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def device() -> str:
    """The device that every op's kernels are tested on: the GPU if there is one."""
    from mimkernels.testing import DEVICE

    return DEVICE
