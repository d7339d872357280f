"""``torch.set_default_device``: what is given on the CPU, or wanted there, is computed there.

Meta stands for every other device: a tensor that is made on it by mistake cannot be used with one of the CPU.
"""

import pytest
import torch

import mimkernels
from mimkernels.data.masks import STRATEGIES, MaskSampler
from mimkernels.heads import CKA, QUANTITIES, HeadStatistics, patch_grid_positions, plot_heads

GRIDS = {2: (8, 8), 3: (4, 8, 8)}
Q, TOKENS, IMAGES = torch.randn(2, 3, 17, 8), torch.randn(2, 17, 8), torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)


def on_meta(function):
    """What a function gives while tensors are made on meta unless it is said where."""
    torch.set_default_device("meta")
    try:
        return function()
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("batch", [3, [7, 0, 5]], ids=["counted", "numbered"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_masks_of_the_cpu(name, backend, batch):
    kind = STRATEGIES[name]
    options = {"block": {"count": 9}, "multiblock": {"min_keep": 2}}.get(name, {})
    sampler = MaskSampler(GRIDS[kind.dims], name, backend=backend, **options)
    scores = torch.rand(3, 64) if sampler.needs_scores else None

    def draw():
        drawn = sampler.sample(batch, 1, 2, device="cpu", scores=scores)
        return drawn.mask, drawn.targets, drawn.masked().ids

    for there, here in zip(on_meta(draw), draw(), strict=True):
        assert (there is None and here is None) or torch.equal(there, here)


# Numbers that no other test gives: what they come to is remembered.
IDS = torch.tensor([[0], [2]])
CALLS = {
    "patchify_gather": lambda: mimkernels.patchify_gather(IMAGES, IDS, 4, mean=[0.123] * 3, std=[0.321] * 3),
    "attention_rows": lambda: mimkernels.attention_rows(Q, Q, [0, 3]),
}


@pytest.mark.parametrize("name", CALLS)
def test_numbers_of_the_host_join_tensors_of_the_cpu(name):
    torch.testing.assert_close(on_meta(CALLS[name]), CALLS[name]())


@pytest.mark.parametrize("name", QUANTITIES)
def test_statistics_of_the_cpu_are_read_there(name):
    positions = patch_grid_positions(4)

    def read():
        seen = HeadStatistics(quantities=[name], num_prefix=1)
        result = mimkernels.attention(Q, Q, Q, num_prefix=1, positions=positions, stats=seen.row_stats)
        seen.update(0, result, q=Q, k=Q, v=Q, tokens=TOKENS, output=TOKENS)
        again = HeadStatistics.from_dict(seen.to_dict())
        plot_heads(again, name)
        empty = HeadStatistics(quantities=[name], num_prefix=1)
        return again.merge(seen).mean(name), again.table(), empty.mean(name).device, empty.layer_mean(name).device

    (mean, table, *devices), (wanted, as_table, *_) = on_meta(read), read()
    torch.testing.assert_close(mean, wanted, equal_nan=True)
    assert table == as_table and {device.type for device in devices} == {"cpu"}


def test_cka_of_the_cpu():
    def read():
        cka = CKA()
        cka.update([TOKENS.repeat(3, 1, 1), TOKENS.square().repeat(3, 1, 1)])
        return cka.result()

    torch.testing.assert_close(on_meta(read), read())


def test_masks_of_packed_sequences():
    from mimkernels.integrations.xformers import fmha

    def bias():
        return fmha.BlockDiagonalMask.from_seqlens([2, 3]).materialize((5, 5))

    assert torch.equal(on_meta(bias), bias())
