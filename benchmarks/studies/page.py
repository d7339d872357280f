"""Writes the study's page from its JSONs alone."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path

import torch
from jinja2 import Environment, StrictUndefined
from torch import Tensor

from benchmarks.studies import plan
from benchmarks.studies.claims import (
    BEYOND,
    BEYOND_CLS,
    CL_VS_MIM,
    CLAIMS,
    CONFIRMED,
    CONTRADICTED,
    DARK_SECRETS,
    FINETUNE,
    MAE,
    MAE_CT,
    MIM_REFINER,
    OPEN,
    READOUT_CLAIMS,
    SIMCLR_V2,
    UNSEEN,
    Claim,
    Finding,
    Study,
    accuracy,
    dense_by_layer,
    fine_tuned,
    judge,
    shown,
    title,
)
from benchmarks.studies.pictures import CAPTIONS, draw_all
from benchmarks.studies.plan import BUDGETS, DATA, METHODS, METRICS, READOUTS, SHARES, Cell, Method, Metric
from benchmarks.studies.readout_pictures import CAPTIONS as READOUT_CAPTIONS
from benchmarks.studies.readout_pictures import draw_readouts

TITLE = "What heads of MIM, supervised and joint-embedding models do"
_TEMPLATE = Path(__file__).parent / "page.md.jinja"
_PAPERS = {
    DARK_SECRETS: "Revealing the Dark Secrets of Masked Image Modeling",
    BEYOND_CLS: "Beyond [cls]",
    MAE: "Masked Autoencoders Are Scalable Vision Learners",
    SIMCLR_V2: "Big Self-Supervised Models are Strong Semi-Supervised Learners",
    MAE_CT: "Contrastive Tuning: A Little Help to Make Masked Autoencoders Forget",
    CL_VS_MIM: "What Do Self-Supervised Vision Transformers Learn?",
    MIM_REFINER: "MIM-Refiner",
}


def write_page(results: Path, docs: Path) -> Path:
    """Write ``study.md`` and ``pictures/study/*.png`` into `docs`; the page's path.

    Raises:
        ValueError: `results` holds no result.
    """
    study = Study(results)
    if not study.results:
        raise ValueError(f"{str(results)!r} holds no result of the study; run python -m benchmarks study")
    folder = docs / "pictures" / "study"
    drawn = [*draw_all(study, folder), *draw_readouts(study, folder)]
    path = docs / "study.md"
    path.write_text(text(study, drawn))
    return path


def text(study: Study, drawn: list[str]) -> str:
    """The page.

    Args:
        drawn: names of the pictures that there are.
    """
    findings = {(claim, budget): judge(claim, study, budget) for claim in CLAIMS for budget in BUDGETS}
    read = {claim: judge(claim, study, "epochs") for claim in READOUT_CLAIMS}
    results, pieces = study.results.values(), study.pieces.values()
    made = [*results, *pieces]
    read_metrics = [metric for metric in METRICS.values() if _dense(study, metric, next(iter(METHODS)))]
    control = [plan.RANDOM] if all(_dense(study, metric, plan.RANDOM) for metric in read_metrics) else []
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(_TEMPLATE.read_text())
    return template.render(
        title=TITLE,
        plan=plan,
        beyond=BEYOND,
        papers=_PAPERS,
        claims=CLAIMS,
        readout_claims=READOUT_CLAIMS,
        readout_counts=_counted([finding.verdict for finding in read.values()]),
        read=lambda claim: _told(claim, read[claim]),
        counts={
            name: _counted([findings[claim, budget].verdict for claim in CLAIMS]) for budget, name in BUDGETS.items()
        },
        cells=len(list(plan.cells())),
        missing=[cell.name for cell in plan.cells() if cell.name not in study.results],
        told=lambda claim, budget: _told(claim, findings[claim, budget]),
        accuracies=lambda method, budget: _accuracies(study, method, budget),
        seconds=lambda method: _seconds_per_epoch(study, method),
        pictures={name: caption for name, caption in CAPTIONS.items() if name in drawn},
        readout_pictures={name: caption for name, caption in READOUT_CAPTIONS.items() if name in drawn},
        missing_pieces=[piece.name for piece in plan.pieces() if piece.name not in study.pieces],
        count_of_pieces=len(list(plan.pieces())),
        other_runs=_other_runs(study),
        fine_tuned=lambda start: _fine_tuned(study, start),
        at_last=lambda metric, method: _at_last(study, metric, method),
        at_best=lambda metric, method: _at_best(study, metric, method),
        read_metrics=read_metrics,
        readers={method: title(method) for method in (*METHODS, *control)},
        unmoved=_unmoved(study),
        results=results,
        pieces=pieces,
        timed_pieces=[sum(piece["seconds"].values()) for piece in pieces if piece["seconds"]],
        timed=[sum(result["seconds"].values()) for result in results if result["seconds"]],
        devices=sorted({f"{result['machine']['device']} ({result['machine']['cpu_isa']})" for result in made}),
        versions=sorted({_versions(result["machine"]) for result in made}),
        revisions=sorted({result["revision"][:10] for result in made}),
    )


def _counted(verdicts: list[str]) -> str:
    counts = Counter(verdicts)
    order = (CONFIRMED, UNSEEN, CONTRADICTED, OPEN)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if counts[verdict])


def _told(claim: Claim, finding: Finding) -> str:
    """A cell of the table: the verdict, how many comparisons speak for it, and a line for each method."""
    counts = ""
    if finding.comparisons:
        counts = f" ({finding.confirmed} for, {finding.contradicted} against, of {finding.comparisons})"
    values = [f"{title(method)} {shown(values, claim.digits)}" for method, values in finding.values.items()]
    return "<br>".join([f"**{finding.verdict}**{counts}", *(value.replace(" ", "&nbsp;") for value in values)])


def _accuracies(study: Study, method: Method, budget: str) -> list[str]:
    """By readout, and what AbMILP gains over [cls]; empty where there is no result."""
    results = list(study.runs(method.name, budget).values())
    if not results:
        return [""] * (len(READOUTS) + 1)
    by_readout = {name: [accuracy(name)(result) for result in results] for name in READOUTS}
    gains = [after - before for after, before in zip(by_readout["abmilp"], by_readout["cls"], strict=True)]
    return [shown(values, 1) for values in (*by_readout.values(), gains)]


def _fine_tuned(study: Study, start: str) -> list[str]:
    """By share of the labels; empty where there is no result."""
    results = list(study.runs(start, "epochs", FINETUNE).values())
    shares = plan.STARTS[start].shares if results else ()
    told = [shown([fine_tuned(share.labels)(result) for result in results], 1) for share in shares]
    return told + [""] * (len(SHARES) - len(shares))


def _dense(study: Study, metric: Metric, method: str) -> list[Tensor]:
    """``[layers]`` of every seed."""
    return [dense_by_layer(metric)(result) for result in study.runs(method, "epochs", metric.data).values()]


def _at_last(study: Study, metric: Metric, method: str) -> str:
    return shown([values[-1].item() for values in _dense(study, metric, method)], metric.digits)


def _at_best(study: Study, metric: Metric, method: str) -> str:
    """The layer whose mean over seeds is best, and its values."""
    values = torch.stack(_dense(study, metric, method))  # [seeds, layers]
    means = values.mean(0)
    layer = int(means.argmax() if metric.larger else means.argmin())
    return f"{layer + 1}: {shown(values[:, layer].tolist(), metric.digits)}"


def _unmoved(study: Study) -> str:
    """PCK@0.1 (%) of correspondence if every point were found at its own place; empty where there is no result."""
    pieces = [piece for piece in study.pieces.values() if piece["kind"] == "dense" and piece["of"] == DATA]
    values = [100 * next(iter(piece["models"].values()))[-1]["correspondence"]["unmoved_pck_10"] for piece in pieces]
    return shown(values, 1) if values else ""


def _other_runs(study: Study) -> list[str]:
    """Models whose run, as the second stage had it, does not end with the losses of its result."""
    names = {
        Cell(method, "epochs", piece["seed"]).name
        for piece in study.pieces.values()
        for method, same in piece["as_recorded"].items()
        if same is False
    }
    return sorted(names)


def _seconds_per_epoch(study: Study, method: Method) -> str:
    """Median over the method's runs."""
    runs = [result for result in study.results.values() if result["method"] == method.name and result["seconds"]]
    return f"{statistics.median(run['seconds']['pretrain'] / run['epochs'] for run in runs):.0f}" if runs else ""


def _versions(machine: dict[str, str]) -> str:
    return f"mimkernels {machine['mimkernels']}, torch {machine['torch']}"
