"""What papers say of MIM models, as comparisons that results of the study confirm or contradict by a rule."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies import plan
from benchmarks.studies.plan import METRICS, PATCHES, SCRATCH, SEEDS, TITLES, Cell, Metric, Piece
from mimkernels.commands.analyze.findings import last_quarter, off_diagonal

BEYOND = 2.0  # standard deviations over seeds that a mean must lie beyond
CONFIRMED, CONTRADICTED, UNSEEN, OPEN = "confirmed", "contradicted", "not seen at this scale", "not yet known"
DARK_SECRETS, BEYOND_CLS = "2205.13543", "2412.03215"
MAE, SIMCLR_V2, MAE_CT, CL_VS_MIM, MIM_REFINER = "2111.06377", "2006.10029", "2304.10520", "2305.00729", "2402.10093"

MIM = ("mae", "simmim")
JOINT = ("mocov3", "dino")
OTHERS = ("supervised", *JOINT)

CELLS, FINETUNE = "cells", "finetune"  # sources of values, besides the data of dense readouts

Result = Mapping[str, Any]


class Study:
    """The results that there are.

    Args:
        folder: of the JSONs.

    Attributes:
        results: by the name of the cell.
        pieces: of the second stage, by name.
    """

    def __init__(self, folder: Path) -> None:
        self.results = _read(folder, [cell.name for cell in plan.cells()])
        self.pieces = _read(folder, [piece.name for piece in plan.pieces()])

    def runs(self, method: str, budget: str, source: str = CELLS) -> dict[int, Result]:
        """By seed: results of cells; of fine-tuning; or, with the name of data, ``{"layers": ...}`` of dense readouts.

        The second stage is of models of equal epochs.
        """
        if source == CELLS:
            found = {seed: self.results.get(Cell(method, budget, seed).run.name) for seed in SEEDS}
        elif budget != "epochs":
            return {}
        elif source == FINETUNE:
            found = {seed: self.pieces.get(Piece("finetune", method, seed).name) for seed in SEEDS}
        else:
            kind = "control" if method == plan.RANDOM else "dense"
            read = {seed: self.pieces.get(Piece(kind, source, seed).name) for seed in SEEDS}
            found = {seed: piece and {"layers": piece["models"][method]} for seed, piece in read.items()}
        return {seed: result for seed, result in found.items() if result is not None}


def _read(folder: Path, names: Sequence[str]) -> dict[str, Result]:
    paths = {name: folder / f"{name}.json" for name in sorted(names)}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


def by_head(result: Result, quantity: str) -> Tensor:
    """``[layers, heads]`` mean over images; one head for what a layer has once."""
    mean = result["analysis"]["heads"][quantity]["mean"]
    return torch.tensor([[math.nan if x is None else x for x in layer] for layer in mean], dtype=torch.float64)


def by_layer(result: Result, quantity: str) -> Tensor:
    return by_head(result, quantity).nanmean(1)


def late(quantity: str) -> Callable[[Result], float]:
    """Mean over the last quarter of the layers."""
    return lambda result: last_quarter(by_layer(result, quantity))


def _late_head_range(quantity: str) -> Callable[[Result], float]:
    def value(result: Result) -> float:
        heads = by_head(result, quantity)
        return last_quarter(heads.amax(1) - heads.amin(1))

    return value


def _late_rise(quantity: str) -> Callable[[Result], float]:
    """Last quarter of the layers less the first."""
    return lambda result: late(quantity)(result) - last_quarter(by_layer(result, quantity).flip(0))


def _late_share_of_largest(quantity: str) -> Callable[[Result], float]:
    return lambda result: late(quantity)(result) / by_layer(result, quantity).max().item()


def _share_of_uniform(result: Result) -> float:
    return late("cls_pos_entropy")(result) / math.log(PATCHES)


def _fall_of_entropy(result: Result) -> float:
    return -_late_rise("cls_pos_entropy")(result) / math.log(PATCHES)


def _similarity_of_layers(result: Result) -> float:
    return off_diagonal(torch.tensor(result["analysis"]["cka"], dtype=torch.float64))


def accuracy(readout: str) -> Callable[[Result], float]:
    """In percent."""
    return lambda result: 100 * result["probe"][readout]["accuracy"]


def _gain(of: str, over: str) -> Callable[[Result], float]:
    return lambda result: accuracy(of)(result) - accuracy(over)(result)


def fine_tuned(labels: str) -> Callable[[Result], float]:
    """Accuracy in percent with this share of the labels."""
    return lambda result: 100 * result["shares"][labels]["accuracy"]


def dense_by_layer(metric: Metric) -> Callable[[Result], Tensor]:
    """``[layers]``, in the unit of the metric."""

    def values(result: Result) -> Tensor:
        by_layer = {
            entry["layers"][0]: entry[metric.task][metric.key]
            for entry in result["layers"]
            if len(entry["layers"]) == 1
        }
        return metric.scale * torch.tensor([by_layer[layer] for layer in sorted(by_layer)], dtype=torch.float64)

    return values


def _at_last(task: str) -> Callable[[Result], float]:
    return lambda result: dense_by_layer(METRICS[task])(result)[-1].item()


def _middle_less_last(task: str) -> Callable[[Result], float]:
    """The mean of the middle third of the layers less the last layer. No layer is chosen by its result."""

    def value(result: Result) -> float:
        layers = dense_by_layer(METRICS[task])(result)
        third = len(layers) // 3
        return (layers[third : len(layers) - third].mean() - layers[-1]).item()

    return value


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper as a comparison.

    Attributes:
        paper: its number at arXiv.
        measure: what is compared, with its unit.
        value: of one result.
        of: methods that the sentence is about.
        against: methods that each of `of` is compared with, or a bound for all of `of`.
        larger: whether values of `of` are larger than what they are compared with.
        digits: after the decimal point.
        source: of the results, as of ``Study.runs``.
        margin: what a difference of methods must be on the claimed side; below 0 where it may be so far on the other.
    """

    paper: str
    text: str
    measure: str
    value: Callable[[Result], float]
    of: tuple[str, ...]
    against: tuple[str, ...] | float
    larger: bool = True
    digits: int = 2
    source: str = CELLS
    margin: float = 0.0


CLAIMS = (
    Claim(DARK_SECRETS, "Supervised models attend locally in early layers and more globally in late ones.",
          "attention distance (pixels), last quarter of the layers less the first; above 0",
          _late_rise("distance"), ("supervised",), 0.0),
    Claim(DARK_SECRETS, "So do contrastive models.",
          "the same of the joint-embedding models; above 0", _late_rise("distance"), JOINT, 0.0),
    Claim(DARK_SECRETS, "MIM brings locality to all layers: late layers stay more local than those of other models.",
          "attention distance (pixels), last quarter of the layers; smaller in each MIM model than in each other one",
          late("distance"), MIM, OTHERS, False),
    Claim(DARK_SECRETS, "Heads of MIM models differ in their reach in late layers, too.",
          "largest less smallest attention distance of a layer's heads (pixels), last quarter; larger in MIM",
          _late_head_range("distance"), MIM, OTHERS),
    Claim(DARK_SECRETS, "Heads of MIM models range from focused to broad in late layers, too.",
          "largest less smallest entropy of a layer's heads (nats), last quarter; larger in MIM",
          _late_head_range("entropy"), MIM, OTHERS),
    Claim(DARK_SECRETS, "Differences between heads almost vanish in the last layers of other models.",
          "head divergence of the last quarter, as a share of the largest layer's; below 1/3",
          _late_share_of_largest("head_divergence"), OTHERS, 1 / 3, False),
    Claim(DARK_SECRETS, "MIM models keep differences between heads in all layers.",
          "the same share of the MIM models; above 1/3", _late_share_of_largest("head_divergence"), MIM, 1 / 3),
    Claim(DARK_SECRETS, "Heads of late layers differ more in MIM models than in others.",
          "head divergence (nats), last quarter of the layers; larger in MIM", late("head_divergence"), MIM, OTHERS),
    Claim(DARK_SECRETS, "Layers of MIM models are more alike than those of other models.",
          "mean CKA between layers; larger in MIM", _similarity_of_layers, MIM, OTHERS),
    Claim(BEYOND_CLS, "[cls] of MIM models attends to itself more than that of joint-embedding models.",
          "attention of [cls] to itself, last quarter of the layers; larger in MIM",
          late("cls_cls_attention"), MIM, JOINT, digits=3),
    Claim(BEYOND_CLS, "[cls] of MIM models attends to patches almost uniformly.",
          f"entropy of [cls] over patches, last quarter, as a share of log {PATCHES}; above 0.9",
          _share_of_uniform, MIM, 0.9, digits=3),
    Claim(BEYOND_CLS, "[cls] of joint-embedding models selects patches.",
          "the same share; larger in MIM than in joint-embedding models", _share_of_uniform, MIM, JOINT, digits=3),
    Claim(BEYOND_CLS, "Selection by [cls] grows with depth in joint-embedding models.",
          f"entropy of [cls] over patches, first quarter less last, as a share of log {PATCHES}; above 0",
          _fall_of_entropy, JOINT, 0.0, digits=3),
    Claim(BEYOND_CLS, "Out of the box, [cls] of MIM models tells less than that of joint-embedding models.",
          "accuracy of a linear probe on [cls] (%); smaller in MIM", accuracy("cls"), MIM, JOINT, False, 1),
    Claim(BEYOND_CLS, "Patches of MIM models hold what [cls] lacks: selective aggregation beats [cls].",
          "accuracy with AbMILP less that with [cls] (points); above 0", _gain("abmilp", "cls"), MIM, 0.0, digits=1),
    Claim(BEYOND_CLS, "Selective aggregation beats the mean of the patches on MIM models.",
          "accuracy with AbMILP less that with the mean (points); above 0", _gain("abmilp", "mean"), MIM, 0.0,
          digits=1),
    Claim(BEYOND_CLS, "Selective aggregation gains more on MIM models than on joint-embedding models.",
          "accuracy with AbMILP less that with [cls] (points); larger in MIM", _gain("abmilp", "cls"), MIM, JOINT,
          digits=1),
)  # fmt: skip

COMPETITIVE = 2.0  # points of accuracy that a model may be behind and still be competitive

# What is known of models of equal epochs alone. Dense readouts are of the last layer unless it says otherwise.
READOUT_CLAIMS = (
    Claim(SIMCLR_V2, "Pre-training without labels, then fine-tuning, is a strong way to learn from few of them.",
          "accuracy (%), fine-tuned with 1% of the labels; larger in every model without labels than from scratch",
          fine_tuned("1%"), (*MIM, *JOINT), (SCRATCH,), digits=1, source=FINETUNE),
    Claim(SIMCLR_V2, "The same with a tenth of them.",
          "the same with 10% of the labels", fine_tuned("10%"), (*MIM, *JOINT), (SCRATCH,), digits=1,
          source=FINETUNE),
    Claim(MAE_CT, "MIM models need enough labels to adapt; where they are few, instance discrimination does better.",
          "accuracy (%), fine-tuned with 1% of the labels; smaller in MIM than in joint-embedding models",
          fine_tuned("1%"), MIM, JOINT, False, 1, FINETUNE),
    Claim(DARK_SECRETS, "Where supervised pre-training covers the categories, MIM models remain competitive.",
          f"accuracy (%), fine-tuned with all labels; in MIM no more than {COMPETITIVE:g} points below supervised",
          fine_tuned("all"), MIM, ("supervised",), True, 1, FINETUNE, -COMPETITIVE),
    Claim(DARK_SECRETS, "MIM models are better than supervised ones at geometry: depth.",
          "RMSE of depth (m); smaller in MIM than supervised",
          _at_last("depth"), MIM, ("supervised",), False, 3, METRICS["depth"].data),
    Claim(DARK_SECRETS, "So they are at pose.",
          "keypoints, PCK@0.1 (%); larger in MIM than supervised",
          _at_last("keypoints"), MIM, ("supervised",), True, 1, METRICS["keypoints"].data),
    Claim(DARK_SECRETS, "So they are at motion, which the paper measures by tracking.",
          "correspondence of patches, PCK@0.1 (%); larger in MIM than supervised",
          _at_last("correspondence"), MIM, ("supervised",), True, 1, METRICS["correspondence"].data),
    Claim(MAE, "Transferred to other tasks, MAE does better than supervised pre-training.",
          "mIoU of segmentation (%); larger in MAE than supervised",
          _at_last("segmentation"), ("mae",), ("supervised",), True, 1, METRICS["segmentation"].data),
    Claim(CL_VS_MIM, "Heads of contrastive models grow alike, which harms dense prediction.",
          "mIoU of segmentation (%); larger in MIM than in joint-embedding models",
          _at_last("segmentation"), MIM, JOINT, True, 1, METRICS["segmentation"].data),
    Claim(MIM_REFINER, "Strong representations of MIM models lie in intermediate layers.",
          "mIoU of nearest patches (points), middle third of the layers less the last; above 0",
          _middle_less_last("knn"), MIM, 0.0, digits=1, source=METRICS["knn"].data),
    Claim(MIM_REFINER, "The same, read by a linear layer.",
          "mIoU of segmentation (points), middle third of the layers less the last; above 0",
          _middle_less_last("segmentation"), MIM, 0.0, digits=1, source=METRICS["segmentation"].data),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What results say of a claim at one budget.

    Attributes:
        verdict: by the rule of ``judge``.
        values: by method, of every seed.
        confirmed, contradicted: how many comparisons are.
        comparisons: how many there are.
    """

    verdict: str
    values: dict[str, list[float]]
    confirmed: int = 0
    contradicted: int = 0
    comparisons: int = 0


def judge(claim: Claim, study: Study, budget: str) -> Finding:
    """Hold a claim against the results.

    Every method of `of` is compared with every method of `against`, seed by seed, less the margin, or with the bound. A
    comparison confirms the claim where the mean of its differences lies beyond ``BEYOND`` standard deviations over
    seeds from 0 on the claimed side, and contradicts it where it does so on the other side. The claim is confirmed if
    every comparison confirms it, contradicted if more than half of them contradict it, and otherwise not seen at this
    scale.
    """
    bound = claim.against if isinstance(claim.against, float) else None
    methods = claim.of if isinstance(claim.against, float) else (*claim.of, *claim.against)
    by_seed = {
        method: {seed: claim.value(result) for seed, result in study.runs(method, budget, claim.source).items()}
        for method in methods
    }
    values = {method: list(seeds.values()) for method, seeds in by_seed.items() if seeds}
    if any(len(seeds) < len(SEEDS) for seeds in by_seed.values()):
        return Finding(OPEN, values)
    sign = 1 if claim.larger else -1
    if bound is not None:
        differences = [[sign * (value - bound) for value in by_seed[method].values()] for method in claim.of]
    else:
        assert isinstance(claim.against, tuple)
        differences = [
            [sign * (by_seed[one][seed] - by_seed[other][seed]) - claim.margin for seed in SEEDS]
            for one, other in product(claim.of, claim.against)
        ]
    sides = [side(each) for each in differences]
    confirmed, contradicted = sides.count(1), sides.count(-1)
    if confirmed == len(sides):
        verdict = CONFIRMED
    elif 2 * contradicted > len(sides):
        verdict = CONTRADICTED
    else:
        verdict = UNSEEN
    return Finding(verdict, values, confirmed, contradicted, len(sides))


def side(differences: Sequence[float]) -> int:
    """1 or -1 where the mean is beyond the spread over seeds, above or below 0; else 0."""
    mean, spread = statistics.mean(differences), statistics.stdev(differences)
    if abs(mean) <= BEYOND * spread or not mean:
        return 0
    return 1 if mean > 0 else -1


def shown(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def title(method: str) -> str:
    return TITLES[method]
