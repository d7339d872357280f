"""What an analysis says in words: a sentence with numbers for each question that the papers ask."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mimkernels.commands.analyze.results import Model
from mimkernels.commands.analyze.sections import change, kept_by_layer
from mimkernels.commands.analyze.series import Series, accuracy_by_depth, series_of
from mimkernels.engine.head_history import Epochs

# Heads whose divergence is below are as good as equal: of how it falls, nothing is said.
_ALIKE = 0.01  # nats


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


def find(
    models: Sequence[Model], similarities: Mapping[str, Tensor], unit: str, compare: Sequence[str] = ()
) -> list[str]:
    """The sentences, in the order of the figures; nothing is said of what was not measured."""
    return [
        *_distance(models, unit),
        *_divergence(models),
        *_scores(models),
        *_similarity(similarities),
        *_cls(models),
        *_importance(models),
        *_sinks(models),
        *_tokens(models),
        *_compared(models, similarities, unit, compare),
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
    ranges = _each([f"{_head_range(one):.3g} {unit} in {one.name}" for one in series if one.heads is not None])
    if ranges:
        sentences.append(
            f"Heads of one layer differ in their reach by {ranges} (largest minus smallest, mean over layers)."
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
        if mean.max() < _ALIKE:
            parts.append(f"in {one.name} all heads attend alike (at most {most})")
        elif layer is None:
            parts.append(f"in {one.name} no layer stays below a third of the largest ({most})")
        else:
            parts.append(f"in {one.name} it stays below a third of the largest ({most}) from layer {layer} on")
    return [f"Difference between the heads of a layer (KL divergence): {'; '.join(parts)}."] if parts else []


def _scores(models: Sequence[Model]) -> list[str]:
    """The head of every model whose scores reach highest."""
    parts = []
    for one in series_of(models, "max_score"):
        assert one.heads is not None
        heads = one.heads.mean(0).nan_to_num(nan=-math.inf)  # [L, H] over runs
        layer, head = divmod(int(heads.argmax()), heads.shape[1])
        value = heads[layer, head].item()
        if math.isfinite(value):
            parts.append(f"{value:.3g} in {one.name} (layer {layer + 1}, head {head + 1})")
    return [f"The largest score before the softmax is, as a mean over images, {_each(parts)}."] if parts else []


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
        sentences.append(f"Of its attention in the last quarter of the layers, [cls] keeps for itself {shown}.")
    uniform = {model.name: math.log(model.runs[0].facts["tokens"] - model.runs[0].facts["prefix"]) for model in models}
    entropy = series_of(models, "cls_pos_entropy")
    if entropy:
        shown = _each([f"{100 * last_quarter(one.mean) / uniform[one.name]:.0f} % in {one.name}" for one in entropy])
        sentences.append(
            f"Relative to uniform attention, the entropy of [cls] over patches in these layers is {shown} (100 %: it "
            "looks at all patches alike)."
        )
    return sentences


def _importance(models: Sequence[Model]) -> list[str]:
    parts = []
    for model in models:
        if model.runs[0].importance:
            layer, head, change = max(
                (
                    (layer, head, value)
                    for layer, heads in enumerate(model.runs[0].importance, 1)
                    for head, value in enumerate(heads, 1)
                ),
                key=lambda item: item[2],
            )
            parts.append(f"head {head} of layer {layer} in {model.name} (1 - cosine {change:.2g})")
    return [f"The last tokens change most without {_each(parts)}."] if parts else []


def _sinks(models: Sequence[Model]) -> list[str]:
    """A sentence for every model: the layer in which one token receives most attention."""
    sentences = []
    prefix, most = (
        {one.name: one for one in series_of(models, name)} for name in ("sink_is_prefix", "argmax_is_prefix")
    )
    norms = {one.name: one for one in series_of(models, "sink_value_norm")}
    runs = {model.name: model.runs[0] for model in models}
    for one in series_of(models, "sink_attention"):
        layer = int(one.mean.nan_to_num(-1).argmax())
        share, keys = one.mean[layer].item(), runs[one.name].facts["keys"][layer]
        where = " in its window" if runs[one.name].in_windows else ""
        of_prefix = ""
        if one.name in prefix:
            percent = 100 * prefix[one.name].mean[layer].item()
            of_prefix = f" it is a prefix token in {percent:.0f} % of heads and images;"
        if one.name in most:
            percent = 100 * most[one.name].mean[layer].item()
            of_prefix += f" {percent:.0f} % of the patches look most at a prefix token;"
        sentences.append(
            f"Strongest sinks of {one.name}, in layer {layer + 1}: one token receives {100 * share:.0f} % of a head's "
            f"attention{where}, {share * keys:.1f} times its share;{of_prefix} its value has "
            f"{norms[one.name].mean[layer].item():.2f} times the mean norm."
        )
    return sentences


def _tokens(models: Sequence[Model]) -> list[str]:
    sentences = []
    accuracy = accuracy_by_depth(models)
    if accuracy:
        parts = []
        for one in accuracy:
            best = int(one.mean.argmax())
            last = f"{one.mean[-1].item():.0f} % after the last" if best < len(one.mean) - 1 else "the last"
            parts.append(f"after layer {best} of {one.name} ({one.mean[best].item():.0f} %; {last})")
        sentences.append(f"A linear classifier on the mean patch token is right most often {_each(parts)}.")
    similar = series_of(models, "token_similarity", part="states")
    if similar:
        shown = _each([f"{one.mean[-1].item():.2f} in {one.name}" for one in similar])
        sentences.append(f"After the last block, two patches of one image have a cosine of {shown} on average.")
    return sentences


def during(runs: Mapping[str, Epochs]) -> list[str]:
    """How the last layers changed while the runs were trained: of each quantity, a sentence."""
    sentences = []
    shown = (
        ("distance", "the attention distance of the last quarter of the layers", "pixels"),
        ("head_divergence", "the difference between heads of these layers", "nats"),
        ("cls_pos_entropy", "the entropy of [cls] over patches in these layers", "nats"),
    )
    for quantity, words, unit in shown:
        parts = []
        for name, run in runs.items():
            if quantity in run.names and len(run.epochs) > 1:
                first, *_, last = run.quarters(quantity)[1].tolist()
                epochs = f"epochs {run.epochs[0].item():g} to {run.epochs[-1].item():g}"
                parts.append((f"from {first:.3g} to {last:.3g} {unit} in {name}", epochs))
        if parts:
            known = {epochs for _, epochs in parts}
            once = f" ({known.pop()})" if len(known) == 1 else ""
            each = _each([part if once else f"{part} ({epochs})" for part, epochs in parts])
            sentences.append(f"In training{once}, {words} goes {each}.")
    return sentences


def _compared(
    models: Sequence[Model], similarities: Mapping[str, Tensor], unit: str, compare: Sequence[str]
) -> list[str]:
    if not compare:
        return []
    before, after = compare
    sentences = []
    kept = kept_by_layer(similarities, before, after)
    if kept is not None:
        least = int(kept.nan_to_num(2).argmin())
        sentences.append(
            f"From {before} to {after}, layer {least} changes most (CKA {kept[least].item():.2f}); the last one keeps "
            f"{kept[-1].item():.2f}."
        )
    for quantity, name, of in (("distance", "attention distance", unit), ("entropy", "entropy", "nats")):
        moved = change(models, before, after, quantity, "heads")
        if moved is not None:
            layer = int(moved.mean.abs().argmax())
            sentences.append(
                f"From {before} to {after}, {name} changes by {moved.mean.mean().item():+.3g} {of} on average, most in "
                f"layer {layer + 1} ({moved.mean[layer].item():+.3g})."
            )
    return sentences
