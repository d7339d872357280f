"""The page of an analysis: findings in words, figures with models side by side on one scale, and every number."""

import functools
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from markupsafe import Markup
from torch import Tensor

from mimkernels.commands.analyze import figures, findings
from mimkernels.commands.analyze.config import AnalyzeConfig
from mimkernels.commands.analyze.results import Model
from mimkernels.commands.analyze.series import series_of
from mimkernels.engine.page import write_page
from mimkernels.heads import CKA, QUANTITIES
from mimkernels.heads.presets import UNIT_NAMES


class Figure(NamedTuple):
    """Panels side by side, with what they show."""

    title: str
    text: str
    panels: list[Markup]
    wide: bool = False


class Section(NamedTuple):
    """Figures under one heading."""

    title: str
    text: str
    figures: list[Figure]


_CLS = (
    ("cls_cls_attention", "[cls] to itself", "The share of its attention that [cls] keeps for itself."),
    ("cls_pos_entropy", "Entropy of [cls] over patches", "How evenly [cls] looks at the patches; at the dashed line it "
     "looks at all of them alike."),
    ("pos_self_attention", "Patches to themselves", "The share of its attention that a patch keeps for itself."),
    ("pos_pos_entropy", "Entropy of patches over patches", "How evenly a patch looks at the patches."),
    ("pos_cls_attention", "Patches to prefix tokens", "The share of its attention that a patch gives to [cls] and "
     "registers."),
)  # fmt: skip


@dataclass
class AnalysisReport:
    """What the template shows of an analysis."""

    config: AnalyzeConfig
    models: list[Model]
    run_facts: dict[str, str]
    versions: dict[str, str]
    _colours: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for model in self.models:
            depths = sorted({run.facts["layers"] for run in model.runs})
            if len(depths) > 1:
                raise ValueError(f"runs of one name must have the same depth; {model.name!r} has {depths}")
        self._colours = figures.colour_of([model.name for model in self.models])

    @property
    def title(self) -> str:
        names = [model.name for model in self.models]
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return self.config.title or f"Heads of {shown}"

    @property
    def unit(self) -> str:
        return UNIT_NAMES[self.config.unit]

    @functools.cached_property
    def similarities(self) -> dict[str, Tensor]:
        """CKA within every model, and between every two by ``"a | b"``; of the first run of each."""
        with_grams = [model for model in self.models if model.runs[0].grams]
        found = {}
        for model in with_grams:
            found[model.name] = _cka(model, model)
        for first, second in itertools.combinations(with_grams, 2):
            shapes = [[len(gram[0]) for gram in model.runs[0].grams] for model in (first, second)]
            if shapes[0] == shapes[1]:
                found[f"{first.name} | {second.name}"] = _cka(first, second)
        return found

    @functools.cached_property
    def findings(self) -> list[str]:
        return findings.find(self.models, self.similarities, self.unit)

    @property
    def sections(self) -> list[Section]:
        sections = [
            Section(
                "Heads",
                "A dot is a head, the dark line the mean over heads; the band is one standard deviation over images. "
                "All panels of a row have one scale." + self._seeds(),
                [figure for figure in self._head_figures() if figure.panels],
            ),
            Section(
                "[cls] and patches",
                "Means over heads and images, as in “Beyond [cls]”; the band is one standard deviation over images.",
                [figure for figure in self._cls_figures() if figure.panels],
            ),
            Section(
                "How alike layers are",
                "Centred kernel alignment of patch tokens: 1 for layers that hold the same up to rotation and scale. "
                "Layer 0 is the input of the first block.",
                self._cka_figures(),
            ),
        ]
        return [section for section in sections if section.figures]

    def _seeds(self) -> str:
        return " Thin lines are single runs of a model." if any(len(model.runs) > 1 for model in self.models) else ""

    @property
    def _x_label(self) -> str:
        return "layer" if self.config.x == "layer" else "relative depth"

    def _head_figures(self) -> list[Figure]:
        tokens = {run.facts["tokens"] for model in self.models for run in model.runs}
        differ = len(tokens) > 1
        shown = [
            ("distance", f"attention distance ({self.unit})", "Attention distance", "How far away the patches are that "
             "a patch attends to, weighted by attention.", False),
            ("entropy", "entropy / log N" if differ else "entropy (nats)", "Entropy", "How widely a patch spreads its "
             "attention." + (" Divided by log N, because the models have different numbers of tokens." if differ else
                             f" {math.log(min(tokens)):.2f} nats would be uniform."), differ),
            ("head_divergence", "KL divergence (nats)", "Difference between heads", "How much a head's attention "
             "differs from that of the other heads of its layer.", False),
            ("nmi", "mutual information", "Dependence on the query", "Normalised mutual information of query and key "
             "patches: 0 where every query attends alike.", False),
        ]  # fmt: skip
        made = []
        for quantity, label, title, text, per_log_tokens in shown:
            series = series_of(self.models, quantity, self.config.x, per_log_tokens=per_log_tokens)
            panels = figures.head_panels(series, label, self._x_label, self._colours) if series else []
            made.append(Figure(title, text, panels))
        return made

    def _cls_figures(self) -> list[Figure]:
        made = []
        for quantity, title, text in _CLS:
            series = series_of(self.models, quantity, self.config.x)
            if not series:
                continue
            unit = QUANTITIES[quantity].unit
            references = {}
            if quantity.endswith("entropy"):
                counts = {run.facts["tokens"] - run.facts["prefix"] for model in self.models for run in model.runs}
                references = {f"uniform: log {count} = {math.log(count):.2f}": math.log(count) for count in counts}
            label = f"entropy ({unit})" if unit else "share of attention"
            panel = figures.lines(series, label, self._x_label, self._colours, references=references)
            made.append(Figure(title, text, [panel], True))
        return made

    def _cka_figures(self) -> list[Figure]:
        within = {name: matrix for name, matrix in self.similarities.items() if " | " not in name}
        between = {name: matrix for name, matrix in self.similarities.items() if " | " in name}
        made = []
        if within:
            made.append(Figure("Within models", "", figures.cka_maps(within)))
        if between:
            made.append(Figure("Between models", "", figures.cka_maps(between)))
        return made

    @property
    def table(self) -> list[list[str]]:
        """A row of sizes for each run."""
        rows = []
        for model in self.models:
            for number, run in enumerate(model.runs, 1):
                facts = run.facts
                name = model.name if len(model.runs) == 1 else f"{model.name}, run {number}"
                sizes = f"{facts['layers']} x {facts['heads']}"
                tokens = f"{facts['tokens']}" + (f", {facts['prefix']} prefix" if facts["prefix"] else "")
                rows.append([name, f"{facts['parameters']:,}", sizes, tokens, f"{facts['img_size']} px",
                             f"{facts['images']:,}", facts["encoder"]])  # fmt: skip
        return rows

    @property
    def notes(self) -> list[str]:
        return [f"{model.name}: {note}" for model in self.models for run in model.runs for note in run.notes]

    @property
    def facts(self) -> dict[str, str]:
        return {**self.run_facts, "Versions": ", ".join(f"{name} {version}" for name, version in self.versions.items())}

    @property
    def settings(self) -> str:
        return json.dumps(self.config.to_dict(), indent=2)

    @property
    def numbers(self) -> dict[str, Any]:
        """Every number of the page, for JSON: NaN is null."""
        models = [
            {
                "name": model.name,
                "runs": [{"facts": run.facts, "notes": run.notes, "heads": _plain(run.heads)} for run in model.runs],
            }
            for model in self.models
        ]
        cka = {name: _plain(matrix.tolist()) for name, matrix in self.similarities.items()}
        return {"format": 1, "findings": self.findings, "models": models, "cka": cka, "settings": self.config.to_dict()}


def write_report(path: Path, report: AnalysisReport) -> Path:
    return write_page(path, "commands/analyze/templates/report.html", title=report.title, report=report)


def _cka(first: Model, second: Model) -> Tensor:
    cka = CKA(tokens="patch")
    for k, l in zip(first.runs[0].grams, second.runs[0].grams, strict=True):
        cka.update_grams(k.double(), l.double())
    return cka.result()


def _plain(value: Any) -> Any:
    """Numbers that JSON has no word for become None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return _plain(torch.as_tensor(value).tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
