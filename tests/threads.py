"""A fixture that several folders of tests share: each takes it by name in its conftest.py."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing from threads, and wait for each other where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
