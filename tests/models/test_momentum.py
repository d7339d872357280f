"""What joint-embedding models share: copies that follow, rows of all processes."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from mimkernels.models.momentum import copy_without_gradients, feature_std, follow, gather, half_cosine


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def test_a_copy_takes_no_gradient_and_shares_no_memory():
    module = net()
    copied = copy_without_gradients(module)
    assert all(parameter.requires_grad for parameter in module.parameters())
    for ours, theirs in zip(copied.parameters(), module.parameters(), strict=True):
        assert not ours.requires_grad and ours.data_ptr() != theirs.data_ptr() and torch.equal(ours, theirs)


def test_an_average_moves_by_its_formula_and_keeps_its_own_buffers():
    average, module = copy_without_gradients(net()), net()
    module[1].running_mean.fill_(7)
    before = copy.deepcopy(average)
    follow(average, module, 0.9)
    for now, old, theirs in zip(average.parameters(), before.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * theirs, rtol=1e-14, atol=1e-15)
    assert torch.equal(average[1].running_mean, before[1].running_mean)


def test_momentum_goes_from_its_start_to_1_along_half_a_cosine():
    assert half_cosine(0.99, 1, 0) == 0.99
    assert half_cosine(0.99, 1, 0.5) == pytest.approx(0.995)
    assert half_cosine(0.99, 1, 0.25) == pytest.approx(1 - 0.01 * (math.sqrt(0.5) + 1) / 2)
    assert half_cosine(0.99, 1, 1) == 1


def test_rows_of_one_process_are_its_own_without_gradient():
    rows = torch.randn(2, 3, requires_grad=True)
    assert torch.equal(gather(rows), rows) and not gather(rows).requires_grad


_OTHER = """
import sys, torch
import torch.distributed as dist
from mimkernels.models.momentum import gather
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
rows = torch.arange(6.0, requires_grad=True).view(2, 3) + 10 * rank
whole = gather(rows.T)
assert not whole.requires_grad
assert torch.equal(whole, torch.cat([torch.arange(6.0).view(2, 3).T, torch.arange(6.0).view(2, 3).T + 10])), whole
dist.destroy_process_group()
"""


def test_rows_of_two_processes_come_in_the_order_of_ranks(tmp_path):
    store = f"file://{tmp_path}/store"
    processes = [subprocess.Popen([sys.executable, "-c", _OTHER, str(rank), store]) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]


def test_spread_is_1_for_directions_of_all_kinds_and_0_for_one():
    torch.manual_seed(0)
    assert feature_std(torch.randn(4096, 64)) == pytest.approx(1, abs=0.01)
    assert feature_std(torch.randn(1, 64) * torch.rand(32, 1)) == pytest.approx(0, abs=1e-5)
