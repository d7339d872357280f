"""Runs of the trainer in turn with FSDP2 on CPU processes, which accelerate itself does for accelerators only."""

import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from mimkernels.commands.pretrain.run import Run
from tests.commands.pretrain.in_turn import in_turn

_init, _prepare = AcceleratorState.__init__, Run._prepare


def init(self, *args, fsdp_plugin=None, **options):
    _init(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def prepare(self):
    model, optimizer = _prepare(self)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert all(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    names = {type(module).__name__ for module in model.modules() if type(module).__name__.startswith("FSDP")}
    self.progress.note(f"sharded: {sorted(names)}")
    return model, optimizer


AcceleratorState.__init__, Run._prepare = init, prepare

if __name__ == "__main__":
    sys.exit(in_turn(sys.argv[1:]))
