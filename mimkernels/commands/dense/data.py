"""Images whose pixels are read: by name, as tensors, with what is true of them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from mimkernels.commands.dense.config import DenseConfig
from mimkernels.commands.dense.windows import Windows
from mimkernels.data.coco_keypoints import CocoPersons
from mimkernels.data.figures import make_figures
from mimkernels.data.joints import Persons
from mimkernels.data.pixel_targets import augmented_copies
from mimkernels.data.scenes import CLASSES, DEPTHS, Scenes, make_scenes
from mimkernels.engine.settings import require

Values = TypeVar("Values")


class _Targets(Generic[Values]):
    """What is true of images, by the names of the attributes that hold it."""

    def target(self, name: str) -> Values:
        """The values of a target that the data have."""
        values: Values | None = getattr(self, name)
        assert values is not None, name  # DenseSource.targets says which are there
        return values


@dataclass
class DenseImages(_Targets[Tensor]):
    """Images, and what is true of them; a target that the data do not have is None.

    Attributes:
        images: ``[n, 3, S, S]`` uint8.
        labels: ``[n, S, S]`` uint8 class numbers, 255 where there is none.
        depths: ``[n, S, S]`` fp32, in metres.
        keypoints: ``[n, 17, 3]`` fp32 x, y and flag of COCO's joints: 0 not labelled, 1 hidden, 2 visible. Pixel i
            covers i to i + 1.
        boxes: ``[n, 4]`` fp32 left, top, width and height of the person, in pixels.
        areas: ``[n]`` fp32 pixels that the person covers.
        warps: ``[n, 3, 3]`` maps to the points of a second image, which ``warped_images`` makes; of test images.
    """

    images: Tensor
    labels: Tensor | None = None
    depths: Tensor | None = None
    keypoints: Tensor | None = None
    boxes: Tensor | None = None
    areas: Tensor | None = None
    warps: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> "DenseImages":
        """The first `count` images with their targets."""
        parts: dict[str, Any] = {}
        for field in fields(self):
            values = getattr(self, field.name)
            parts[field.name] = None if values is None else values[:count]
        return DenseImages(**parts)


@dataclass
class WholeImages(_Targets[list[Tensor]]):
    """Whole test images by sliding windows, with what is true of their pixels at their own size.

    Attributes:
        labels, depths: ``[H, W]`` of every image, as those of ``DenseImages``.
    """

    windows: Windows
    labels: list[Tensor] | None = None
    depths: list[Tensor] | None = None


@dataclass
class DenseData:
    """What is learnt from and what is tested on.

    Attributes:
        train: no images where the data have no targets.
        whole: what scores are of, in place of ``test``, with ``config.test_on`` whole.
        content: what the images show, in the plural.
        classes: names of the numbers in ``labels``.
        depth_range: between which a depth is valid, in metres.
        left_out: how many images cannot be read, such as which, and why; empty if all can.
    """

    train: DenseImages
    test: DenseImages
    content: str
    classes: tuple[str, ...] = ()
    depth_range: tuple[float, float] = (0.0, float("inf"))
    whole: WholeImages | None = None
    left_out: str = ""


class DenseSource(ABC):
    """Data that ``--data`` names. The constructor refuses what cannot be loaded; images are read by ``load``.

    Attributes:
        targets: names of the attributes of ``DenseImages`` that its images have besides ``images``.
        in_folder: it lies in the folder ``config.data_root``; others are made.
        has_whole: whether ``config.test_on`` may be whole.
        copied: targets that stay true of ``config.copies``.
        flip_test: whether ``config.flip_test`` is on by default.
    """

    targets: ClassVar[tuple[str, ...]] = ()
    in_folder: ClassVar[bool] = False
    has_whole: ClassVar[bool] = False
    copied: ClassVar[tuple[str, ...]] = ("labels",)
    flip_test: ClassVar[bool] = False

    def __init__(self, config: DenseConfig) -> None:
        self.config = config

    @abstractmethod
    def load(self) -> DenseData:
        """``config.train_images`` and ``config.test_images`` images of ``config.side`` pixels.

        Raises:
            ValueError: an image cannot be read.
        """

    def key(self) -> tuple[object, ...]:
        """Changes when the images change."""
        config = self.config
        counts = (config.train_images, config.test_images, config.copies)
        return config.data, config.side, config.seed, *counts, config.test_on


class ScenesSource(DenseSource):
    """Rooms cast ray by ray."""

    targets = ("labels", "depths")

    def load(self) -> DenseData:
        config = self.config
        train, test = (_from_scenes(make_scenes(count, config.side, seed)) for count, seed in _parts(config))
        if config.copies:
            images, labels = augmented_copies(
                zip(train.images, train.target("labels"), strict=True), config.side, config.copies, config.seed
            )
            train = DenseImages(images, labels)
        return DenseData(train, test, "rooms", CLASSES, DEPTHS)


class FiguresSource(DenseSource):
    """Articulated figures with exact joints."""

    targets = ("keypoints", "boxes", "areas")

    def load(self) -> DenseData:
        config = self.config
        train, test = (_from_persons(make_figures(count, config.side, seed)) for count, seed in _parts(config))
        return DenseData(train, test, "figures")


class CocoKeypointsSource(DenseSource):
    """Persons of COCO's keypoints, each in a square around its box."""

    targets = ("keypoints", "boxes", "areas")
    in_folder = True

    def __init__(self, config: DenseConfig) -> None:
        super().__init__(config)
        self.train = CocoPersons(config.data_root, "train", config.train_images, config.seed)
        self.test = CocoPersons(config.data_root, "val", config.test_images, config.seed)
        require(len(self.train) >= 2, "data_root", repr(config.data_root), "of at least 2 persons to learn from")

    def load(self) -> DenseData:
        train, test = (_from_persons(persons.load(self.config.side)) for persons in (self.train, self.test))
        return DenseData(train, test, "persons")

    def key(self) -> tuple[object, ...]:
        return self.config.data, self.config.side, self.train.fingerprint(), self.test.fingerprint()


def _parts(config: DenseConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """Counts and seeds of made training and test images; no image of one is in the other, whatever the counts."""
    return (config.train_images, 2 * config.seed), (config.test_images, 2 * config.seed + 1)


def _from_scenes(scenes: Scenes) -> DenseImages:
    return DenseImages(*map(torch.from_numpy, scenes))


def _from_persons(persons: Persons) -> DenseImages:
    images, joints, boxes, areas = map(torch.from_numpy, persons)
    return DenseImages(images, keypoints=joints, boxes=boxes, areas=areas)
