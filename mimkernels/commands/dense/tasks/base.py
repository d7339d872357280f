"""What every task says of itself; the run, the terminal and the report go by this alone."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from markupsafe import Markup
from torch import Tensor

from mimkernels.commands.dense.config import DenseConfig
from mimkernels.commands.dense.data import DenseData, DenseImages, DenseSource
from mimkernels.commands.dense.heads import Reader, predict_squares, predict_whole

Scores = TypeVar("Scores", bound=NamedTuple)


class Features(NamedTuple):
    """Images with their maps of the layers that are read together, ``[n, D, h, w]`` each, on the CPU."""

    maps: list[Tensor]
    truth: DenseImages


@dataclass
class Job:
    """One task on one choice of layers.

    Attributes:
        whole: maps of the windows of ``data.whole``, where that is there.
        further: maps of the task's ``further_images``.
        mirrored, whole_mirrored: maps of the test images and of the windows, each mirrored, where both are averaged.
        what: the task, the model and the layers, for errors.
    """

    config: DenseConfig
    data: DenseData
    train: Features
    test: Features
    device: torch.device
    what: str
    whole: list[Tensor] = field(default_factory=list)
    further: list[Tensor] = field(default_factory=list)
    mirrored: list[Tensor] = field(default_factory=list)
    whole_mirrored: list[Tensor] = field(default_factory=list)

    @property
    def channels(self) -> int:
        return sum(maps.shape[1] for maps in self.train.maps)

    def predictions(self, reader: Reader, target: str) -> tuple[Tensor, Iterable[tuple[Tensor, Tensor]]]:
        """What a reader makes of the squares for pictures, and predictions with targets ``[H, W]`` for scores."""
        whole = self.data.whole
        if whole is None:
            squares = predict_squares(reader, self.test.maps, self.size, self.device, self.mirrored)
            return squares, zip(squares, self.test.truth.target(target), strict=True)
        count = max(1, self.config.pictures)
        shown, mirrored = ([maps[:count] for maps in of_test] for of_test in (self.test.maps, self.mirrored))
        targets = whole.target(target)
        sizes = [(values.shape[0], values.shape[1]) for values in targets]
        predicted = predict_whole(reader, self.whole, whole.windows, sizes, self.device, self.whole_mirrored)
        squares = predict_squares(reader, shown, self.size, self.device, mirrored)
        return squares, zip(predicted, targets, strict=True)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of pixels."""
        return self.config.side, self.config.side


@dataclass
class Reading(Generic[Scores]):
    """What a task read.

    Attributes:
        predictions: of the test images, the first dimension; the run keeps those of the pictures.
        losses: of every step; empty where nothing is trained.
    """

    scores: Scores
    predictions: Tensor
    losses: list[float] = field(default_factory=list)


class ChartSection(NamedTuple):
    """A chart of the page beneath a heading."""

    title: str
    text: str
    chart: Markup


PictureRow = tuple[str, list[str]]  # name, and a data address per test image


class Task(ABC, Generic[Scores]):
    """A way to read images from their feature maps.

    Attributes:
        name: as ``--tasks`` has it.
        targets: attributes of ``DenseImages`` that it needs.
        explanation: sentences of the page on what its scores are.
        columns: of the table, those of ``cells``.
        curves: scores over the layers, by the name of their axis, short: it has the height of a chart.
        picture_title, picture_text: of the table of pictures; tasks of one title share theirs.
    """

    name: ClassVar[str]
    targets: ClassVar[tuple[str, ...]]
    explanation: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    curves: ClassVar[Mapping[str, Callable[[Any], float]]]
    picture_title: ClassVar[str]

    def check(self, source: DenseSource) -> None:
        """Raise ValueError unless the data have what the task needs, and what is learnt stays true of ``copies``."""
        for target in self.targets:
            if target not in source.targets:
                held = ", ".join(source.targets) or "images alone"
                raise ValueError(
                    f"task {self.name!r} needs data with {target}, but data {source.config.data!r} have {held}"
                )
            if source.config.copies and target not in source.copied:
                raise ValueError(
                    f"copies must be 0 for task {self.name!r}, got {source.config.copies}: of data "
                    f"{source.config.data!r} they keep {', '.join(source.copied)} true, but not {target}; name other "
                    "--tasks"
                )

    def check_loaded(self, data: DenseData) -> None:
        """Raise ValueError where the images to learn from have a target that says nothing."""

    def further_images(self, data: DenseData) -> Tensor | None:
        """Images ``[n, 3, S, S]`` uint8 that are encoded besides those of the data."""
        return None

    @abstractmethod
    def read(self, job: Job) -> Reading[Scores]:
        """Learn from the training images where anything is learnt, and score the test images."""

    @abstractmethod
    def worth(self, scores: Scores) -> float:
        """By which readouts are compared: more is better."""

    @abstractmethod
    def summary(self, scores: Scores) -> str:
        """The main score, for a line of progress."""

    @abstractmethod
    def cells(self, scores: Scores) -> list[str]:
        """A row of the table."""

    def numbers(self, scores: Scores) -> dict[str, Any]:
        """Every score, for JSON."""
        return scores._asdict()

    def sections(self, data: DenseData, scores: Mapping[str, Scores]) -> list[ChartSection]:
        """Charts of the best readout of every model, by its label."""
        return []

    def picture_text(self, data: DenseData, shown: DenseImages) -> str:
        """What the colours of the pictures mean."""
        return ""

    def legend(self, data: DenseData) -> list[tuple[str, str]]:
        """Names and their colours."""
        return []

    @abstractmethod
    def true_rows(self, data: DenseData, shown: DenseImages) -> list[PictureRow]:
        """Pictures of what is true of the test images, between the images and what was read."""

    @abstractmethod
    def read_rows(self, data: DenseData, shown: DenseImages, label: str, predictions: Tensor) -> list[PictureRow]:
        """Pictures of what a readout, by its label, read from the test images, and of where it is wrong."""


def figure(value: float, form: str, unit: str = "") -> str:
    """A number in the format `form` with its unit; a dash where there is none, NaN."""
    return "–" if math.isnan(value) else f"{value:{form}}{unit}"


def percent(share: float) -> str:
    return figure(100 * share, ".1f", " %")
