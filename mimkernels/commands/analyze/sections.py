"""The figures of the page, in sections: which quantity, how it is drawn, and what it means in a sentence."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from markupsafe import Markup
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mimkernels.commands.analyze import figures
from mimkernels.commands.analyze.results import Model
from mimkernels.commands.analyze.series import Series, accuracy_by_depth, series_of


class Figure(NamedTuple):
    """Panels side by side, with what they show."""

    title: str
    text: str
    panels: list[Markup]


class Section(NamedTuple):
    """Figures under one heading; those of `pairs` stand two in a row."""

    title: str
    text: str
    figures: list[Figure]
    pairs: bool = False


class Line(NamedTuple):
    """One quantity as lines of all models in one panel."""

    quantity: str
    label: str
    title: str
    text: str


_CLS = (
    Line("cls_cls_attention", "share of attention", "[cls] to itself", "What [cls] keeps for itself."),
    Line("cls_pos_entropy", "entropy (nats)", "Entropy of [cls] over patches", "How evenly [cls] looks at the patches; "
         "at the dashed line, at all of them alike."),
    Line("pos_self_attention", "share of attention", "Patches to themselves", "What a patch keeps for itself."),
    Line("pos_pos_entropy", "entropy (nats)", "Entropy of patches over patches", "How evenly patches look at them."),
    Line("pos_cls_attention", "share of attention", "Patches to prefix tokens", "What a patch gives to [cls] and "
         "registers."),
)  # fmt: skip
_SINKS = (
    Line("sink_attention", "share of attention", "Attention on the sink", "What the token that receives most gets of "
         "all attention of a head."),
    Line("sink_is_prefix", "share of images and heads", "The sink is [cls] or a register", "1 where it always is one, "
         "0 where it always is a patch."),
    Line("argmax_is_prefix", "share of patches", "Patches whose largest weight is on [cls] or a register", "Of several "
         "equal weights, the first token's counts."),
    Line("sink_value_norm", "norm / mean norm", "Norm of the sink's value", "Relative to the mean of all tokens; near "
         "0, attention to the sink changes nothing."),
)  # fmt: skip
_STATES = (
    Line("token_similarity", "mean cosine", "Similarity of patch tokens", "Mean cosine of two different patches of one "
         "image; 1 where all patches say the same."),
    Line("high_frequency", "relative log amplitude", "High frequencies", "Amplitude of the finest pattern over the "
         "image relative to that of the mean; higher keeps more detail."),
    Line("pos_magnitude", "norm", "Norm of patch tokens", ""),
    Line("cls_magnitude", "norm", "Norm of [cls]", ""),
)  # fmt: skip
_OUTPUTS = (
    Line("pos_output_magnitude", "norm", "Norm of attention's output, patches", "After the projection."),
    Line("cls_output_magnitude", "norm", "Norm of attention's output, [cls]", "After the projection."),
)


class Drawer:
    """Draws models in their colours, on one horizontal axis."""

    def __init__(self, models: Sequence[Model], x: str, unit: str) -> None:
        self.models, self.x, self.unit = models, x, unit
        self.windows = any(run.in_windows for model in models for run in model.runs)
        self.colours = figures.colour_of([model.name for model in models])
        self.x_label = "layer" if x == "layer" else "relative depth"

    def sections(self, similarities: Mapping[str, Tensor], compare: Sequence[str]) -> list[Section]:
        """All that have a figure."""
        seeds = any(len(model.runs) > 1 for model in self.models)
        thin = " Thin lines are single runs of a model." if seeds else ""
        band = "The band is one standard deviation over images." + thin
        shares = " In windows, a share is one of a window's attention, which has fewer keys." if self.windows else ""
        sections = [
            *self._compared(similarities, compare),
            Section("Heads", "A dot is a head, the dark line the mean over heads. All panels of a row have one scale. "
                    + band, self._heads()),
            Section("[cls] and patches", "Means over heads and images, as in “Beyond [cls]”. " + band + shares,
                    self._lines(_CLS, "heads"), True),
            Section("Heads that matter", "How much the last tokens change if one head alone is taken out: 1 - cosine, "
                    "mean over tokens and images. Dark heads do nothing that the others do not do as well.",
                    self._importance()),
            Section("Attention sinks", "The sink of a head is the token that receives most attention of an image. "
                    "Means over heads and images. " + band + shares, self._lines(_SINKS, "heads"), True),
            Section("Tokens", "After every block; 0 is the input of the first one. " + band,
                    [*self._accuracy(), *self._lines(_STATES, "states"), *self._lines(_OUTPUTS, "outputs")], True),
            Section("How alike layers are", "Centred kernel alignment of patch tokens: 1 for layers that hold the same "
                    "up to rotation and scale. Layer 0 is the input of the first block.", self._cka(similarities)),
        ]  # fmt: skip
        return [section for section in sections if section.figures]

    def _heads(self) -> list[Figure]:
        keys = {count for model in self.models for run in model.runs for count in run.facts["keys"]}
        differ = len(keys) > 1 or self.windows
        seen = "keys that a patch can see, which differs between layers or models" if self.windows else (
            "tokens, which differs between the models")  # fmt: skip
        by = f" Divided by the logarithm of the number of {seen}: 1 would be uniform." if differ else (
            f" {math.log(min(keys)):.2f} nats would be uniform.")  # fmt: skip
        shown = (
            Line("distance", f"attention distance ({self.unit})", "Attention distance", "How far away the patches are "
                 "that a patch attends to, weighted by attention."),
            Line("normalized_entropy" if differ else "entropy", "entropy / log N" if differ else "entropy (nats)",
                 "Entropy", "How widely a patch spreads its attention." + by),
            Line("head_divergence", "KL divergence (nats)", "Difference between heads", "How much a head's attention "
                 "differs from that of the other heads of its layer."),
            Line("nmi", "mutual information", "Dependence on the query", "Normalised mutual information of query and "
                 "key patches: 0 where every query attends alike, 1 where each attends to a patch of its own."),
            Line("max_score", "score before the softmax", "Largest score", "The largest logit of an image's patches. "
                 "One that grows in training can end in attention to single tokens and in spikes of the loss."),
        )  # fmt: skip
        made = []
        for quantity, label, title, text in shown:
            series = series_of(self.models, quantity, self.x)
            if series:
                panels = figures.head_panels(series, label, self.x_label, self.colours)
                made.append(Figure(title, text, panels))
        return made

    def _lines(self, shown: Sequence[Line], part: str) -> list[Figure]:
        made = []
        for quantity, label, title, text in shown:
            # Entropies in nats over all patches and over those of a window do not compare.
            models = [model for model in self.models
                      if "pos_entropy" not in quantity or not any(run.in_windows for run in model.runs)]  # fmt: skip
            series = series_of(models, quantity, self.x, part=part)
            if series:
                counts = {run.facts["tokens"] - run.facts["prefix"] for model in models for run in model.runs}
                uniform = {f"uniform: log {count} = {math.log(count):.2f}": math.log(count) for count in sorted(counts)}
                made.append(self._figure(series, label, title, text, uniform if "pos_entropy" in quantity else {}))
        return made

    def _figure(
        self, series: Sequence[Series], label: str, title: str, text: str, references: Mapping[str, float]
    ) -> Figure:
        panel = figures.lines(series, label, self.x_label, self.colours, references=references)
        return Figure(title, text, [panel])

    def _accuracy(self) -> list[Figure]:
        series = accuracy_by_depth(self.models, self.x)
        text = "A classifier on the mean patch token, fitted on seven tenths of the images and tested on the others."
        return [self._figure(series, "accuracy (%)", "What a linear classifier reads", text, {})] if series else []

    def _importance(self) -> list[Figure]:
        by_name = {model.name: pad_sequence([torch.tensor(heads) for heads in model.runs[0].importance], True, math.nan)
                   for model in self.models if model.runs[0].importance}  # fmt: skip
        return [Figure("Change of the tokens without a head", "", figures.importance_maps(by_name))] if by_name else []

    def _cka(self, similarities: Mapping[str, Tensor]) -> list[Figure]:
        within = {name: matrix for name, matrix in similarities.items() if " | " not in name}
        between = {name: matrix for name, matrix in similarities.items() if " | " in name}
        parts = (("Within models", within), ("Between models", between))
        return [Figure(title, "", figures.cka_maps(maps)) for title, maps in parts if maps]

    def _compared(self, similarities: Mapping[str, Tensor], compare: Sequence[str]) -> list[Section]:
        if not compare:
            return []
        before, after = compare
        made = []
        diagonal = kept_by_layer(similarities, before, after)
        if diagonal is not None:
            x = torch.arange(len(diagonal), dtype=torch.float64)
            series = Series(after, x, diagonal[None], torch.full_like(diagonal, math.nan))
            panel = figures.lines([series], "CKA", "layer", self.colours)
            made.append(
                Figure("What stays", f"CKA of every layer of {before} with the same layer of {after}.", [panel])
            )
        for quantity, label, title, part in (
            ("distance", f"distance ({self.unit})", "Attention distance", "heads"),
            ("entropy", "entropy (nats)", "Entropy", "heads"),
            ("head_divergence", "divergence (nats)", "Difference between heads", "heads"),
            ("token_similarity", "mean cosine", "Similarity of patch tokens", "states"),
        ):
            moved = change(self.models, before, after, quantity, part)
            if moved is not None:
                panel = figures.lines([moved], f"change of {label}", "layer", self.colours, references={"no change": 0})
                made.append(Figure(title, "", [panel]))
        text = f"{after} minus {before}, layer by layer, means over heads and images."
        return [Section(f"From {before} to {after}", text, made, True)] if made else []


def kept_by_layer(similarities: Mapping[str, Tensor], before: str, after: str) -> Tensor | None:
    """``[L]`` CKA of every layer with the same one of another model; None if their depths differ."""
    matrix = similarities.get(f"{before} | {after}", similarities.get(f"{after} | {before}"))
    return matrix.diagonal() if matrix is not None and matrix.shape[0] == matrix.shape[1] else None


def change(models: Sequence[Model], before: str, after: str, quantity: str, part: str) -> Series | None:
    """What a quantity gained by layer; None if a model lacks it or the depths differ."""
    found = {one.name: one for one in series_of(models, quantity, part=part)}
    first, second = found.get(before), found.get(after)
    if first is None or second is None or len(first.x) != len(second.x):
        return None
    return Series(after, second.x, (second.mean - first.mean)[None], torch.full_like(second.mean, math.nan))
