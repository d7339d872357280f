"""What an analysis says in words: a sentence with numbers for each question that the papers ask."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mimkernels.commands.analyze.results import Model
from mimkernels.commands.analyze.series import Series, series_of


def last_quarter(values: Tensor) -> float:
    """Mean over the last quarter of the layers, at least one."""
    return values[-max(1, math.ceil(len(values) / 4)) :].mean().item()


def falls_below(values: Tensor, share: float = 1 / 3) -> int | None:
    """The first layer, from 1, from which on the values stay below `share` of their maximum; None if they never do."""
    below = values < share * values.max()
    stays = below.flip(0).long().cumprod(0).flip(0).bool()
    return int(stays.nonzero()[0]) + 1 if stays.any() else None


def off_diagonal(similarity: Tensor) -> float:
    """Mean of the entries off the diagonal of a square matrix; NaN for one layer."""
    count = len(similarity)
    if count < 2:
        return math.nan
    return ((similarity.sum() - similarity.diagonal().sum()) / (count * (count - 1))).item()


def find(models: Sequence[Model], similarities: Mapping[str, Tensor], unit: str) -> list[str]:
    """The sentences, in the order of the figures; nothing is said of what was not measured."""
    return [
        *_distance(models, unit),
        *_divergence(models),
        *_similarity(similarities),
        *_cls(models),
    ]


def _each(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _distance(models: Sequence[Model], unit: str) -> list[str]:
    series = series_of(models, "distance")
    if not series:
        return []
    values = {one.name: last_quarter(one.mean) for one in series}
    shown = _each([f"{value:.3g} {unit} in {name}" for name, value in values.items()])
    sentences = [f"Attention of the last quarter of the layers reaches {shown} on average."]
    first = _each([f"{one.mean[0].item():.3g} in {one.name}" for one in series])
    sentences[0] += f" In the first layer it reaches {first}."
    ranges = _each([f"{_head_range(one):.3g} in {one.name}" for one in series if one.heads is not None])
    if ranges:
        sentences.append(
            f"Heads of one layer differ in their reach by {ranges} {unit} (largest minus smallest, mean over layers)."
        )
    return sentences


def _head_range(one: Series) -> float:
    assert one.heads is not None
    heads = one.heads.nan_to_num(nan=math.nan)
    spread = torch.where(heads.isnan(), -math.inf, heads).amax(2) - torch.where(heads.isnan(), math.inf, heads).amin(2)
    return spread.mean().item()


def _divergence(models: Sequence[Model]) -> list[str]:
    parts = []
    for one in series_of(models, "head_divergence"):
        mean = one.mean
        if not mean.isfinite().all():
            continue
        layer = falls_below(mean)
        most = f"{mean.max().item():.3g} nats in layer {int(mean.argmax()) + 1}"
        if layer is None:
            parts.append(f"in {one.name} no layer stays below a third of the largest ({most})")
        else:
            parts.append(f"in {one.name} it stays below a third of the largest ({most}) from layer {layer} on")
    return [f"Difference between the heads of a layer (KL divergence): {'; '.join(parts)}."] if parts else []


def _similarity(similarities: Mapping[str, Tensor]) -> list[str]:
    within = {name: off_diagonal(matrix) for name, matrix in similarities.items() if " | " not in name}
    within = {name: value for name, value in within.items() if math.isfinite(value)}
    sentences = []
    if within:
        shown = _each([f"{value:.2f} in {name}" for name, value in within.items()])
        sentences.append(f"Layers of one model are alike by a mean CKA of {shown} (off the diagonal; 1 is alike).")
    between = {name: matrix for name, matrix in similarities.items() if " | " in name}
    if between:
        name, matrix = max(between.items(), key=lambda item: item[1].nanmean().item())
        row, column = divmod(int(matrix.nan_to_num(-1).argmax()), matrix.shape[1])
        first, _, second = name.partition(" | ")
        sentences.append(
            f"Of two models, {first} and {second} are most alike: mean CKA {matrix.nanmean().item():.2f}, at most "
            f"{matrix[row, column].item():.2f} (layer {row} of {first}, layer {column} of {second})."
        )
    return sentences


def _cls(models: Sequence[Model]) -> list[str]:
    sentences = []
    itself = series_of(models, "cls_cls_attention")
    if itself:
        shown = _each([f"{100 * last_quarter(one.mean):.0f} % in {one.name}" for one in itself])
        sentences.append(f"In the last quarter of the layers [cls] attends to itself with {shown} of its attention.")
    uniform = {model.name: math.log(run.facts["tokens"] - run.facts["prefix"]) for model in models
               for run in model.runs[:1]}  # fmt: skip
    entropy = series_of(models, "cls_pos_entropy")
    if entropy:
        shown = _each([f"{100 * last_quarter(one.mean) / uniform[one.name]:.0f} % in {one.name}" for one in entropy])
        sentences.append(
            f"The entropy of [cls] over patches is {shown} of that of uniform attention in these layers (100 %: it "
            "looks at all patches alike)."
        )
    return sentences
