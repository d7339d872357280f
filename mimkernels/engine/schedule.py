"""Learning rate over the steps, and which parameters are decayed."""

import math
from collections.abc import Iterable
from typing import Any

import torch


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, floor: float = 0.0) -> float:
    """Linear warm-up from 0, then half a cosine down to ``floor``, per optimizer step.

    Args:
        step: 0 for the first optimizer step, which has learning rate 0 if there is a warm-up (as in the MAE code).
        total_steps: steps of the whole run; ``floor`` would be reached at this step.
        warmup_steps: the first step at which the rate is ``peak``.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def scaled_learning_rate(blr: float, effective_batch: int) -> float:
    """Linear scaling rule: ``blr`` is the rate for 256 images."""
    return blr * effective_batch / 256


def parameter_groups(named: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices are decayed; biases, norms and all other parameters of at most one axis are not.

    ``[1, 1, D]`` tokens ([cls], mask) have one axis that matters but are decayed, as in the published MAE code.
    """
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or name.endswith(".bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
