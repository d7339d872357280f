"""Weights and optimizer state as plain CPU tensors, the same whether the model is wrapped, sharded or neither."""

from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict


def capture(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model and optimizer state with parameter names as keys. With several processes every one of them must call this.

    Named keys make the file independent of how it was trained: DDP, FSDP2 and a single process read each other's.
    Processes other than the first may get empty dicts.
    """
    return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def restore(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    model_state: dict[str, Any],
    optimizer_state: dict[str, Any],
) -> None:
    """Load what ``capture`` gave into a freshly prepared model and optimizer."""
    set_state_dict(
        model,
        optimizer,
        model_state_dict=model_state,
        optim_state_dict=optimizer_state,
        options=StateDictOptions(full_state_dict=True),
    )
