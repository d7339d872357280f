"""Two processes with half of the images each against one with all of them; run once per rank."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mimkernels.models import MoCoV3
from mimkernels.models.momentum import gather

VIT = {"name": "vit_tiny_patch16_224", "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def build(**changes):
    torch.manual_seed(0)
    model = MoCoV3.from_timm(**{**VIT, "mlp_dim": 24, "out_dim": 8, **changes})
    with torch.no_grad():  # zeros and ones of a fresh model would hide swapped or forgotten parameters
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def views(images=6):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(images, 3, 16, 16, generator=generator) for _ in range(2))


def norms_fixed(model):
    """In training but for the batch norms, which would take other statistics of fewer images."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.eval()
    return model


def compare_with_one_process(store: str, rank: int) -> None:
    whole = norms_fixed(build())
    whole.follow(0.9)
    loss = whole(views()).loss
    loss.backward()

    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        model = norms_fixed(build())
        parallel = DistributedDataParallel(model)
        model.follow(0.9)
        half = slice(3 * rank, 3 * rank + 3)
        out = parallel(tuple(view[half] for view in views()))
        out.loss.backward()
        losses = gather(out.loss.detach()[None])
        torch.testing.assert_close(losses.mean(), loss.detach(), rtol=1e-5, atol=1e-6)
        assert losses[0] != losses[1]  # each has queries of its own
        for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
            if theirs.grad is None:
                assert ours.grad is None, name
                assert torch.equal(ours, theirs), name
            else:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)
        # A batch that is validated on has its own keys alone: the last one may be smaller elsewhere.
        model.eval()
        alone = model(tuple(view[: 2 + rank] for view in views())).loss
        assert torch.isfinite(alone)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare_with_one_process(sys.argv[1], int(sys.argv[2]))
