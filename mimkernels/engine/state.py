"""Weights and optimizer state as plain CPU tensors, the same whether the model is wrapped, sharded or neither."""

from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from mimkernels.models.checkpoint import check_by_name

_MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model and optimizer state with parameter names as keys. With several processes every one of them must call this.

    Named keys make the file independent of how it was trained: DDP, FSDP2 and a single process read each other's
    checkpoints. Processes other than the first may get empty dicts. A parameter that has never been updated has the
    moments that its first update will start from.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    both: tuple[Any, Any] = get_state_dict(model, optimizer, options=options)
    weights, state = both
    moments = state.get("state", {})
    for group in state.get("param_groups", []):
        for name in group["params"]:
            if name not in moments:
                zeros = {key: torch.zeros_like(weights[name], dtype=torch.float32) for key in _MOMENTS}
                moments[name] = {"step": torch.tensor(0.0), **zeros}
    return weights, state


def check_fits(
    model: torch.nn.Module, model_state: dict[str, Any], optimizer_state: dict[str, Any], where: str
) -> None:
    """Raise ValueError unless both states, as read from a file, are whole and of this model; nothing is loaded.

    Args:
        model: not wrapped yet.
        where: the file, for the refusal.
    """
    check_by_name(model.state_dict(), model_state, title=f"{where}: weights")
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    groups, moments = optimizer_state.get("param_groups"), optimizer_state.get("state")
    if not _are_groups(groups) or sorted(name for group in groups for name in group["params"]) != sorted(trained):
        raise ValueError(
            f"checkpoint {where!r} is malformed: the optimizer's groups are not those of the trained weights"
        )
    for name, weight in trained.items():
        entry = moments.get(name) if isinstance(moments, dict) else None
        if not isinstance(entry, dict):
            raise ValueError(f"checkpoint {where!r} is malformed: the optimizer holds nothing of {name!r}")
        for key in (*_MOMENTS, "step"):
            value, shape = entry.get(key), [] if key == "step" else list(weight.shape)
            if not _is_dense(value) or list(value.shape) != shape:
                held = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"checkpoint {where!r} is malformed: the optimizer's {key} of {name!r} is {held}, expected dense "
                    f"torch.float32 {shape}"
                )


def _is_dense(value: Any) -> TypeGuard[Tensor]:
    # The fused optimizer trusts this: other strides or types would have it read and write elsewhere.
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.layout != torch.strided:
        return False
    return value.is_contiguous() and not value.is_meta


def load_state(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    model_state: dict[str, Any],
    optimizer_state: dict[str, Any],
) -> None:
    """Load what ``state_of`` returned into a freshly prepared model and optimizer, which keeps its settings."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    set_state_dict(
        model,
        optimizer,
        model_state_dict=model_state,
        optim_state_dict=optimizer_state,
        options=StateDictOptions(full_state_dict=True),
    )
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)


def _are_groups(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(
        isinstance(group, dict)
        and isinstance(group.get("params"), list)
        and all(isinstance(name, str) for name in group["params"])
        for group in value
    )
