"""Two processes capture different images; what they reduce to is what one process captures of all of them."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import mimkernels
from tests.integrations import models as m


def captured(model):
    return mimkernels.capture(model, ["entropy", "distance"], num_prefix=1, positions=(4, 4))


def compare_with_one_process(rank: int, store: Path) -> None:
    x = m.tokens(batch=4)
    model = m.hand_written()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        parallel = DistributedDataParallel(model)
        with captured(parallel) as heads:
            parallel(x[:3] if rank == 0 else x[3:]).sum().backward()
            if rank == 1:  # two layers more
                model(x[:1], m.tokens(batch=1, length=5))
        total = heads.reduce()
    finally:
        dist.destroy_process_group()
    with captured(model) as whole:
        model(x)
        model(x[:1], m.tokens(batch=1, length=5))
    assert set(total) == set(whole) == {"blocks.0", "blocks.1", "blocks.0#1", "blocks.1#1"}
    assert {name: layer.missing for name, layer in total.items()} == {n: layer.missing for n, layer in whole.items()}
    assert values(total).keys() == values(whole).keys()
    for key, (images, mean, std) in values(total).items():
        assert images == values(whole)[key][0]
        torch.testing.assert_close(mean, values(whole)[key][1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(std, values(whole)[key][2], rtol=1e-4, atol=1e-5, equal_nan=True)


def values(heads):
    """Images, means and deviations by layer and quantity."""
    names = {layer.index: name for name, layer in heads.items()}
    return {
        (names[number], quantity): (group.images[number], group.mean(quantity)[row], group.std(quantity)[row])
        for group in heads.groups
        for quantity in group.names
        for row, number in enumerate(group.layers)
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare_with_one_process(int(sys.argv[1]), Path(sys.argv[2]))
