"""What figures draw: for each model, values by layer with their spread over images and over runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mimkernels.commands.analyze.results import Model

_SIGNED = ("token_similarity", "high_frequency", "max_score")


@dataclass
class Series:
    """One quantity of one model.

    Attributes:
        name: of the model.
        x: ``[L]`` where the layers lie on the horizontal axis.
        runs: ``[S, L]`` mean over images and heads, of every run.
        spread: ``[L]`` standard deviation over images, NaN where it is not known.
        heads: ``[S, L, H]`` mean over images of every head, or None for what a layer has once.
        signed: values below 0 are possible; else the band of the spread ends there.
    """

    name: str
    x: Tensor
    runs: Tensor
    spread: Tensor
    heads: Tensor | None = None
    signed: bool = False

    @property
    def band(self) -> tuple[Tensor, Tensor]:
        """``[L]`` each: the mean less and plus the spread."""
        lower = self.mean - self.spread
        return (lower if self.signed else lower.clamp(min=0)), self.mean + self.spread

    @property
    def mean(self) -> Tensor:
        """``[L]`` over runs."""
        return self.runs.mean(0)


def places(layers: int, x: str, first: int = 1) -> Tensor:
    """Where layers lie on the horizontal axis: numbers from `first`, or relative depths."""
    numbers = torch.arange(layers, dtype=torch.float64)
    return numbers + first if x == "layer" else numbers / max(1, layers - 1)


def series_of(
    models: Sequence[Model],
    quantity: str,
    x: str = "layer",
    *,
    part: str = "heads",
) -> list[Series]:
    """One quantity of every model that has it.

    Args:
        part: whose it is: of "heads" and attention's "outputs", layers are numbered from 1; of "states", 0 is the input
            of the first block.
    """
    found = []
    for model in models:
        statistics = [seen for run in model.runs if (seen := run.statistics(part)) and quantity in seen.names]
        if len(statistics) < len(model.runs):
            continue
        means = [seen.mean(quantity) for seen in statistics]
        spread = [seen.std(quantity).nanmean(1) for seen in statistics]
        runs = torch.stack([mean.nanmean(1) for mean in means])
        heads = torch.stack(means) if statistics[0].is_per_head(quantity) else None
        first = 0 if part == "states" else 1
        x_of_layers, mean_spread = places(runs.shape[1], x, first), torch.stack(spread).mean(0)
        found.append(Series(model.name, x_of_layers, runs, mean_spread, heads, quantity in _SIGNED))
    return found


def accuracy_by_depth(models: Sequence[Model], x: str = "layer") -> list[Series]:
    """Accuracy of a linear classifier, in percent, after every block."""
    found = []
    for model in models:
        if all(run.accuracy for run in model.runs):
            runs = 100 * torch.tensor([run.accuracy for run in model.runs], dtype=torch.float64)
            spread = torch.full_like(runs[0], math.nan)
            found.append(Series(model.name, places(runs.shape[1], x, 0), runs, spread))
    return found


def limits(series: Sequence[Series], *, heads: bool = True, also: Sequence[float] = ()) -> tuple[float, float]:
    """The vertical axis on which all of it is seen, single heads too; from 0 unless that would flatten the lines."""
    parts = [one.runs.flatten() for one in series]
    parts += [one.heads.flatten() for one in series if heads and one.heads is not None]
    parts += [torch.cat(one.band) for one in series]
    values = torch.cat([*parts, torch.tensor([float(value) for value in also], dtype=torch.float64)])
    values = values[values.isfinite()]
    if not len(values):
        return 0.0, 1.0
    low, high = values.min().item(), values.max().item()
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    if low >= 0 and low <= 0.6 * high:
        return (-room / 2 if low < room else 0.0), high + room
    return low - room, high + room
