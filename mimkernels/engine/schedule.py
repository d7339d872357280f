"""Learning rate over the steps, and which parameters are decayed."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch


def learning_rate(
    step: int,
    total_steps: int,
    warmup_steps: int,
    peak: float,
    floor: float = 0.0,
    *,
    start: float = 0.0,
    tenth_from: int | None = None,
) -> float:
    """Linear warm-up from ``start``, then half a cosine down to ``floor``, or one step, per optimizer step.

    Args:
        step: 0 for the first optimizer step, which has learning rate ``start`` if there is a warm-up.
        total_steps: steps of the whole run; ``floor`` would be reached at this step.
        warmup_steps: the first step at which the rate is ``peak``.
        tenth_from: the first step at which the rate is a tenth of ``peak``, in place of the cosine.
    """
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    if tenth_from is not None:
        return peak if step < tenth_from else peak / 10
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def scaled_learning_rate(blr: float, effective_batch: int) -> float:
    """Linear scaling rule: ``blr`` is the rate for 256 images."""
    return blr * effective_batch / 256


def parameter_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]],
    weight_decay: float,
    undecayed: Callable[[str], bool] = lambda name: False,
) -> list[dict[str, Any]]:
    """Two groups: matrices are decayed; biases, norms and all other parameters of at most one axis are not.

    ``[1, 1, D]`` tokens ([cls], mask) have one axis that matters but are decayed, as in the published MAE code, unless
    `undecayed` says of their name that they are not.
    """
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            small = parameter.ndim <= 1 or name.endswith(".bias")
            (plain if small or undecayed(name) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
