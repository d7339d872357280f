"""Writes the study's page from its JSONs alone."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from benchmarks.studies import plan
from benchmarks.studies.claims import (
    BEYOND,
    BEYOND_CLS,
    CLAIMS,
    CONFIRMED,
    CONTRADICTED,
    DARK_SECRETS,
    OPEN,
    UNSEEN,
    Claim,
    Finding,
    Study,
    accuracy,
    judge,
    shown,
    title,
)
from benchmarks.studies.pictures import CAPTIONS, draw_all
from benchmarks.studies.plan import BUDGETS, READOUTS, Method

TITLE = "What heads of MIM, supervised and joint-embedding models do"
_TEMPLATE = Path(__file__).parent / "page.md.jinja"
_PAPERS = {DARK_SECRETS: "Revealing the Dark Secrets of Masked Image Modeling", BEYOND_CLS: "Beyond [cls]"}


def write_page(results: Path, docs: Path) -> Path:
    """Write ``study.md`` and ``pictures/study/*.png`` into `docs`; the page's path.

    Raises:
        ValueError: `results` holds no result.
    """
    study = Study(results)
    if not study.results:
        raise ValueError(f"{str(results)!r} holds no result of the study; run python -m benchmarks study")
    drawn = draw_all(study, docs / "pictures" / "study")
    path = docs / "study.md"
    path.write_text(text(study, drawn))
    return path


def text(study: Study, drawn: list[str]) -> str:
    """The page.

    Args:
        drawn: names of the pictures that there are.
    """
    findings = {(claim, budget): judge(claim, study, budget) for claim in CLAIMS for budget in BUDGETS}
    results = study.results.values()
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(_TEMPLATE.read_text())
    return template.render(
        title=TITLE,
        plan=plan,
        beyond=BEYOND,
        papers=_PAPERS,
        claims=CLAIMS,
        counts={
            name: _counted([findings[claim, budget].verdict for claim in CLAIMS]) for budget, name in BUDGETS.items()
        },
        cells=len(list(plan.cells())),
        missing=[cell.name for cell in plan.cells() if cell.name not in study.results],
        told=lambda claim, budget: _told(claim, findings[claim, budget]),
        accuracies=lambda method, budget: _accuracies(study, method, budget),
        seconds=lambda method: _seconds_per_epoch(study, method),
        pictures={name: CAPTIONS[name] for name in drawn},
        results=results,
        timed=[sum(result["seconds"].values()) for result in results if result["seconds"]],
        devices=sorted({f"{result['machine']['device']} ({result['machine']['cpu_isa']})" for result in results}),
        versions=sorted({_versions(result["machine"]) for result in results}),
        revisions=sorted({result["revision"][:10] for result in results}),
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


def _seconds_per_epoch(study: Study, method: Method) -> str:
    """Median over the method's runs."""
    runs = [result for result in study.results.values() if result["method"] == method.name and result["seconds"]]
    return f"{statistics.median(run['seconds']['pretrain'] / run['epochs'] for run in runs):.0f}" if runs else ""


def _versions(machine: dict[str, str]) -> str:
    return f"mimkernels {machine['mimkernels']}, torch {machine['torch']}"
