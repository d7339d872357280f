"""What a fine-tuning run shows: accuracy, curves, confusions, mistakes, heads, and how to load the model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from mimkernels._palette import CHART
from mimkernels.commands.finetune.config import FinetuneConfig
from mimkernels.commands.finetune.mistakes import Mistake, Tested
from mimkernels.engine.figures import as_colour, bare_map, enlarged, loss_curve, png_address, svg
from mimkernels.engine.head_history import STRIP_WORDS, Epochs, Strip, strips
from mimkernels.engine.page import write_page
from mimkernels.engine.progress import count, counted, duration, printable

_NUMBERED, _DRAWN, _PAIRS = 15, 100, 12  # classes with numbers in the map, classes in a map at all; pairs in the table


class Card(NamedTuple):
    """One mistake."""

    picture: str  # data address
    label: str
    true: str
    named: str
    probability: str


@dataclass
class FinetuneReport:
    """What the templates show of a run.

    Attributes:
        run_facts: what was run, by name.
        entries: log entries; empty where their file was lost.
        heads: picture of the heads before and after, as a data address; None if they cannot be recorded.
        during: what the heads do on the same images at several epochs.
        layers: the table of learning rates.
        pictures: mistakes.
        arguments: of ``timm.create_model``; None where timm has no such readout.
        files: of weights.
    """

    config: FinetuneConfig
    run_facts: dict[str, str]
    entries: list[dict[str, float]]
    steps_per_epoch: int
    heads: str | None
    during: Epochs | None
    layers: list[list[str]]
    tested: Tested
    classes: list[str]
    pictures: list[Mistake]
    arguments: dict[str, Any] | None
    files: list[Path]
    versions: dict[str, str]
    backends: dict[str, str]

    @property
    def title(self) -> str:
        config = self.config
        start = f"{config.arch} from scratch" if config.from_scratch else config.model
        return config.title or f"Fine-tuning of {start} on {config.data}"

    @property
    def result(self) -> str:
        """The result in a line."""
        tested = self.tested
        top5 = "" if tested.top5 is None else f", {tested.top5:.1%} among five"
        return (
            f"accuracy {tested.accuracy:.2%} ± {tested.standard_error:.2%} of {len(tested):,} test images{top5}"
            + (f"; best while training {self.best[0]:.2%} at epoch {self.best[1]:.3g}{self._fewer}" if self.best
               else "")
        )  # fmt: skip

    @property
    def best(self) -> tuple[float, float] | None:
        """The best accuracy of the validations, and its epoch."""
        seen = [(entry["val_accuracy"], -entry["step"]) for entry in self.entries if "val_accuracy" in entry]
        if not seen:
            return None
        accuracy, step = max(seen)
        return accuracy, -step / self.steps_per_epoch

    @property
    def _fewer(self) -> str:
        """How many images the validations saw, where those were not all."""
        seen = self.config.val_images
        return f", of {seen:,} images" if seen < len(self.tested) else ""

    @property
    def tiles(self) -> list[tuple[str, str]]:
        tested = self.tested
        tiles = [(f"{tested.accuracy:.1%}", f"of {len(tested):,} test images named correctly, ± "
                                            f"{tested.standard_error:.1%}")]  # fmt: skip
        if tested.top5 is not None:
            tiles.append((f"{tested.top5:.1%}", "have their class among the five likeliest"))
        if self.best:
            tiles.append((f"{self.best[0]:.1%}", f"best while training, at epoch {self.best[1]:.3g}{self._fewer}"))
        if self.entries:
            rates = sorted(entry["images_per_second"] for entry in self.entries)
            last = self.entries[-1]
            tiles.append((count(rates[len(rates) // 2]), "images per second, median"))
            tiles.append(
                (
                    duration(last["seconds"]),
                    f"for {counted(self.config.epochs, 'epoch')}, {counted(int(last['step']), 'step')}",
                )
            )
        return tiles

    @property
    def loss_words(self) -> str:
        return self.config.the_method.loss_words(self.config)

    @property
    def curve(self) -> Markup:
        return loss_curve(self.entries, self.steps_per_epoch)

    @property
    def confusion(self) -> Markup | None:
        """A map of the confusions, rows being true classes; None of too many classes."""
        return None if len(self.classes) > _DRAWN else confusion_map(self.tested.matrix.numpy(), self.classes)

    @property
    def confused(self) -> list[list[str]]:
        """Pairs of classes that are confused most often."""
        return [
            [self.classes[one.true], self.classes[one.named], f"{one.images:,}", f"{one.share:.1%}"]
            for one in self.tested.confusions(_PAIRS)
        ]

    @property
    def class_rows(self) -> list[list[str]]:
        rows = [
            (recall, [name, f"{images:,}", _percent(recall), _percent(precision)])
            for name, (images, recall, precision) in zip(self.classes, self.tested.by_class(), strict=True)
        ]
        return [row for _, row in sorted(rows, key=lambda pair: (pair[0] == pair[0], pair[0]))][:_DRAWN]

    @property
    def cards(self) -> list[Card]:
        return [
            Card(png_address(enlarged(as_colour(one.image))), one.label, self.classes[one.true],
                 self.classes[one.named], f"{one.probability:.0%}")
            for one in self.pictures
        ]  # fmt: skip

    @property
    def strips(self) -> list[Strip]:
        """The heads over the epochs, where there are more than two of them."""
        return [] if self.during is None or len(self.during.epochs) <= 2 else strips({"": self.during})

    @property
    def strip_words(self) -> str:
        return STRIP_WORDS

    @property
    def loading(self) -> str:
        """Code that loads the model in timm."""
        if self.arguments is None:
            return ""
        arguments = dict(self.arguments)
        name, best = arguments.pop("model_name"), self.files[0].name
        options = "".join(f"{key}={value!r}, " for key, value in arguments.items())
        return f'timm.create_model("{name}", {options}checkpoint_path="{best}")'

    @property
    def facts(self) -> dict[str, str]:
        names = sorted(set(self.backends.values()))
        kernels = (f"{name}: {', '.join(op for op in self.backends if self.backends[op] == name)}" for name in names)
        versions = (f"{name} {version}" for name, version in self.versions.items())
        return {**self.run_facts, "Kernels": "; ".join(kernels), "Versions": ", ".join(versions)}

    @property
    def settings(self) -> str:
        return json.dumps(self.config.to_dict(), indent=2)


def write_report(path: Path, report: FinetuneReport) -> Path:
    return write_page(path, "commands/finetune/templates/report.html", title=report.title, report=report)


def confusion_map(matrix: np.ndarray, classes: list[str]) -> Markup:
    """Confusions as shares of each row, with counts where there is room, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    classes = [printable(name) for name in classes]
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    numbered = len(classes) <= _NUMBERED
    with matplotlib.rc_context(CHART):
        side = 2.2 + 0.5 * len(classes) if numbered else 9.0
        figure = Figure(figsize=(side + 0.8, side), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="magma", vmin=0, vmax=1)
        bare_map(axes)
        ticks = range(0, len(classes), 1 if len(classes) <= 40 else 5)
        axes.set_xticks(ticks, [classes[tick] for tick in ticks], rotation=90)
        axes.set_yticks(ticks, [classes[tick] for tick in ticks])
        axes.set_xlabel("named")
        axes.set_ylabel("true class")
        if numbered:
            for row, column in zip(*np.nonzero(matrix), strict=True):
                dark = shares[row, column] < 0.6
                axes.text(column, row, f"{matrix[row, column]:,}", ha="center", va="center", fontsize=8,
                          color="white" if dark else "black")  # fmt: skip
        bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
        bar.set_label("share of the class")
        bar.outline.set_visible(False)
        return svg(figure, fitted=True)


def _percent(value: float) -> str:
    return "" if value != value else f"{value:.1%}"
