"""The page of an analysis: findings in words, figures with models side by side on one scale, and every number."""

import functools
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from torch import Tensor

from mimkernels.commands.analyze import findings
from mimkernels.commands.analyze.config import AnalyzeConfig
from mimkernels.commands.analyze.maps import Maps
from mimkernels.commands.analyze.pictures import MarkedImage, marked_images
from mimkernels.commands.analyze.results import Model
from mimkernels.commands.analyze.sections import Drawer, Figure, Section
from mimkernels.engine import files
from mimkernels.engine.command import TrainingError
from mimkernels.engine.figures import as_colour, png_address
from mimkernels.engine.head_history import STRIP_WORDS, Epochs, strips
from mimkernels.engine.page import render, write_with_numbers
from mimkernels.engine.published import LoadReport
from mimkernels.heads import CKA
from mimkernels.heads.presets import UNIT_NAMES


@dataclass
class AnalysisReport:
    """What the template shows of an analysis."""

    config: AnalyzeConfig
    models: list[Model]
    epochs: dict[str, list[Epochs]]  # by model, of runs that recorded their heads in training, if that is to be shown
    run_facts: dict[str, str]
    versions: dict[str, str]

    def __post_init__(self) -> None:
        for model in self.models:
            try:
                check_same_size(model.name, [Size.of(run.facts) for run in model.runs])
            except ValueError as e:
                raise TrainingError(str(e)) from None

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
        return [
            *findings.find(self.models, self.similarities, self.unit, self.config.compare),
            *findings.during({run: epochs for _, run, epochs in _named_runs(self.epochs)}),
        ]

    @property
    def sections(self) -> list[Section]:
        drawer = Drawer(self.models, self.config.x, self.unit)
        return [*self._during(drawer.colours), *drawer.sections(self.similarities, self.config.compare)]

    def _during(self, colours: Mapping[str, str]) -> list[Section]:
        if not self.epochs:
            return []
        named = _named_runs(self.epochs)
        by_run = {run: colours[name] for name, run, _ in named}
        drawn = strips({run: epochs for _, run, epochs in named}, by_run)
        shown = [Figure(strip.title, strip.text, strip.panels) for strip in drawn]
        return [Section("During training", f"On the images that each run recorded. {STRIP_WORDS}", shown)]

    @functools.cached_property
    def maps(self) -> dict[str, Maps]:
        """Attention rows of the first run of every model that has them."""
        return {model.name: Maps(**model.runs[0].maps) for model in self.models if model.runs[0].maps}

    @property
    def marked(self) -> list[MarkedImage]:
        """Attention of marked queries, and the weights of trained poolings."""
        return marked_images(self.maps, self._pooled)

    @property
    def pooled_words(self) -> str:
        """What the trained poolings are, and how often their classifiers are right; or why there are none."""
        if not any(self._pooled.values()):
            return "Weights of trained poolings would stand beside it if the images had classes."
        images = max(one["images"] for pooled in self._pooled.values() for one in pooled.values())
        names = list(dict.fromkeys(name for pooled in self._pooled.values() for name in pooled))
        shares = [
            f"{model} " + ", ".join(f"{100 * one['accuracy']:.0f} % ({name})" for name, one in pooled.items())
            for model, pooled in self._pooled.items()
            if pooled
        ]
        return (
            f"Beside it, what a classifier uses: the weights of {' and '.join(names)}, poolings trained on the last "
            f"tokens of {images:,} of the images. Of the others they name correctly: {'; '.join(shares)}."
        )

    @property
    def _pooled(self) -> dict[str, dict[str, Any]]:
        return {model.name: model.runs[0].pooled for model in self.models}

    @property
    def viewer(self) -> Markup:
        """The attention of every model as JSON, for the script of the page; empty without any."""
        if not self.maps:
            return Markup("")
        largest = max((maps.images for maps in self.maps.values()), key=lambda images: images.shape[-1])
        count = min(len(maps.images) for maps in self.maps.values())
        content = {
            "images": [png_address(as_colour(image)) for image in largest[:count]],
            "models": [maps.for_page(name) for name, maps in self.maps.items()],
        }
        return Markup(json.dumps(content).replace("<", "\\u003c"))

    @property
    def table(self) -> list[list[str]]:
        """A row of sizes for each run."""
        rows = []
        for model in self.models:
            for number, run in enumerate(model.runs, 1):
                facts = run.facts
                name = model.name if len(model.runs) == 1 else f"{model.name}, run {number}"
                heads = _span(layer["heads"] for layer in run.heads["layers"].values())
                sizes = f"{facts['layers']} x {heads}"
                tokens = _span(facts["keys"]) + (f", {facts['prefix']} prefix" if facts["prefix"] else "")
                tokens += f", in {_span(facts['windows'])} windows" if run.in_windows else ""
                rows.append([name, f"{facts['parameters']:,}", sizes, tokens, f"{facts['img_size']} px",
                             f"{facts['images']:,}", facts["encoder"]])  # fmt: skip
        return rows

    @property
    def notes(self) -> list[str]:
        names: dict[str, dict[str, None]] = {}  # of the models that a note is of, each once
        for model in self.models:
            for note in (note for run in model.runs for note in run.notes):
                names.setdefault(note, {})[model.name] = None
        return [f"{', '.join(models)}: {note}" for note, models in names.items()]

    @property
    def facts(self) -> dict[str, str]:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        loading = {
            f"Weights of {model.name}": "; ".join(
                dict.fromkeys(LoadReport(**run.facts["loading"]).text for run in model.runs if run.facts.get("loading"))
            )
            for model in self.models
        }
        return {**self.run_facts, **loading, "Versions": versions}

    @property
    def settings(self) -> str:
        return json.dumps(self.config.to_dict(), indent=2)

    @property
    def numbers(self) -> dict[str, Any]:
        """Every number of the page, for JSON: NaN is null."""
        parts = ("facts", "notes", "heads", "states", "outputs", "accuracy", "importance")
        models = [
            {
                "name": model.name,
                "runs": [{part: files.json_numbers(getattr(run, part)) for part in parts} for run in model.runs],
            }
            for model in self.models
        ]
        cka = {name: files.json_numbers(matrix.tolist()) for name, matrix in self.similarities.items()}
        during = {
            run: [
                {"epoch": epoch, "heads": files.json_numbers(seen.to_dict())}
                for epoch, seen in zip(epochs.epochs.tolist(), epochs.seen, strict=True)
            ]
            for _, run, epochs in _named_runs(self.epochs)
        }
        return {
            "format": 1, "findings": self.findings, "models": models, "cka": cka, "during": during,
            "settings": self.config.to_dict(),
        }  # fmt: skip


class Size(NamedTuple):
    """What runs of one name must have in common to be averaged."""

    layers: int
    heads: int  # the most that a layer has
    dim: int
    prefix: int
    grid: tuple[int, int] | None

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Size":
        """That of a model by the facts of its pass."""
        grid = facts["grid"]
        return cls(facts["layers"], facts["heads"], facts["dim"], facts["prefix"], tuple(grid) if grid else None)

    def __str__(self) -> str:
        patches = "no grid of patches" if self.grid is None else f"{self.grid[0]} x {self.grid[1]} patches"
        return f"{self.layers} layers of {self.heads} heads, {self.dim} wide, {self.prefix} prefix tokens, {patches}"


def check_same_size(name: str, sizes: Iterable[Size]) -> None:
    """Raise ValueError unless all runs of a model have one size."""
    found = list(dict.fromkeys(sizes))
    if len(found) > 1:
        raise ValueError(
            f"runs of one name must be of one size; {name!r} has {' and '.join(map(str, found))}: name them apart"
        )


def _named_runs(epochs: Mapping[str, list[Epochs]]) -> list[tuple[str, str, Epochs]]:
    """Of every run the name of its model, a name of its own, and what it recorded."""
    return [
        (name, name if len(runs) == 1 else f"{name}, run {number}", run)
        for name, runs in epochs.items()
        for number, run in enumerate(runs, 1)
    ]


def write_report(folder: Path, report: AnalysisReport, numbers: str) -> Path:
    """The page, and the numbers as JSON, into the folder."""
    page = render("commands/analyze/templates/report.html", title=report.title, report=report)
    return write_with_numbers(folder, page, numbers, report.config.to_json())


def _cka(first: Model, second: Model) -> Tensor:
    cka = CKA(tokens="patch")
    for k, l in zip(first.runs[0].grams, second.runs[0].grams, strict=True):
        cka.update_grams(k.double(), l.double())
    return cka.result()


def _span(counts: Iterable[int]) -> str:
    """What counts are, from the lowest to the highest."""
    counts = sorted(counts)
    return f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
