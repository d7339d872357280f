"""The data that ``--data`` names: made scenes, folders with targets of every pixel, and images alone."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimkernels.commands.dense.config import DenseConfig
from mimkernels.commands.dense.data import (
    CocoKeypointsSource,
    DenseData,
    DenseImages,
    DenseSource,
    FiguresSource,
    ScenesSource,
    WholeImages,
)
from mimkernels.commands.dense.windows import slide
from mimkernels.data.batches import UNREADABLE, Augmentation, reason_of
from mimkernels.data.pixel_targets import (
    NYU_CROP,
    NYU_DEPTHS,
    NYU_SIZE,
    ADE20KFolder,
    NYUv2Folder,
    PixelTargets,
    augmented_copies,
    middle_square,
    nyu_crop,
    resized,
    with_draws,
)
from mimkernels.data.pixels import drawn
from mimkernels.data.sources import is_named
from mimkernels.data.split import open_part
from mimkernels.engine.progress import counted


class _FolderSource(DenseSource):
    """Images with a target of every pixel: some of both parts, chosen by the seed."""

    in_folder = has_whole = True
    target: str  # the attribute of ``DenseImages``
    train: PixelTargets
    test: PixelTargets

    def key(self) -> tuple[object, ...]:
        return *super().key(), self.train.fingerprint(), self.test.fingerprint()

    def load(self) -> DenseData:
        config = self.config
        learnt = self.train.chosen(config.train_images, config.seed)
        tested = self.test.chosen(config.test_images, config.seed)
        if config.copies:
            train = self._copies(self.train.read(number) for number in learnt)
        else:
            train = self._squares(self.train.read(number) for number in learnt)
        data = DenseData(train, self._squares(self.test.read(number) for number in tested), "images")
        if config.test_on == "whole":
            pictures, targets = zip(*(self.test.read(number) for number in tested), strict=True)
            # The images alone are resized: what is read is resized to their targets.
            enlarged = [resized(*pair, self._shorter)[0] for pair in zip(pictures, targets, strict=True)]
            data.whole = WholeImages(slide(enlarged, config.side), **self._targets(list(targets)))
        return data

    @property
    def _shorter(self) -> int:
        """The shorter side that whole images are resized to, so that what is learnt from has their scale."""
        return self.config.side

    def _copies(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> DenseImages:
        """``config.copies`` augmented crops of each image."""
        config = self.config
        return self._images(*augmented_copies(pairs, config.side, config.copies, config.seed))

    def _squares(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> DenseImages:
        squares = [middle_square(*pair, self.config.side, self._shorter) for pair in pairs]
        return self._images(*(torch.stack(parts) for parts in zip(*squares, strict=True)))

    def _images(self, images: Tensor, targets: Tensor) -> DenseImages:
        return DenseImages(images, **self._targets(targets))

    def _targets(self, values: Any) -> dict[str, Any]:
        return {self.target: values}


class ADE20KSource(_FolderSource):
    """ADE20K in the folders of the scene parsing challenge."""

    targets = ("labels",)
    target = "labels"
    test: ADE20KFolder

    def __init__(self, config: DenseConfig) -> None:
        super().__init__(config)
        self.train, self.test = (ADE20KFolder(config.data_root, train) for train in (True, False))

    def load(self) -> DenseData:
        data = super().load()
        data.classes = tuple(self.test.classes)
        return data


class NYUv2Source(_FolderSource):
    """NYU Depth v2 in folders of pictures."""

    targets = ("depths",)
    target = "depths"
    copied = ("depths",)
    flip_test = True

    def __init__(self, config: DenseConfig) -> None:
        super().__init__(config)
        self.train, self.test = (NYUv2Folder(config.data_root, train, config.depth_scale) for train in (True, False))

    @property
    def _shorter(self) -> int:
        side = self.config.side
        return round(side * NYU_SIZE[0] / NYU_CROP[0]) if self.config.copies else side

    def _copies(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> DenseImages:
        """Crops of 416 x 544 pixels, their shorter side at ``config.side``, by windows as whole images."""
        config = self.config
        crops = [
            resized(*nyu_crop(*drawn_from), config.side) for drawn_from in with_draws(pairs, config.copies, config.seed)
        ]
        windows = slide([image for image, _ in crops], config.side)
        squares = [
            depths[top : top + config.side, left : left + config.side]
            for (_, depths), corners in zip(crops, windows.corners, strict=True)
            for top, left in corners
        ]
        return self._images(windows.images, torch.stack(squares))

    def load(self) -> DenseData:
        data = super().load()
        data.depth_range = NYU_DEPTHS
        return data


class ImagesSource(DenseSource):
    """Images without targets: of a set that other commands know by name, or of a folder.

    Those that cannot be read are left out. Of sets with targets one such image ends the run: their scores are
    compared with others', which are of all images.
    """

    def __init__(self, config: DenseConfig) -> None:
        super().__init__(config)
        known = ", ".join(SOURCES)
        if not is_named(config.data) and not Path(config.data).is_dir():
            raise ValueError(
                f"data must be one of {known}, or images alone: digits, fashion-mnist, torchvision:NAME or a folder; "
                f"there is no folder {config.data!r}"
            )
        root = config.data_root or "data"  # where other commands look
        self.images = open_part(config.data, root)
        self._pixels = ""  # digest of what was read

    def key(self) -> tuple[object, ...]:
        # The fingerprint of a folder is of its files' names.
        return *super().key(), self.images.fingerprint(), self._pixels

    def load(self) -> DenseData:
        config, squares = self.config, Augmentation(self.config.side, 3, 1.0, False)
        chosen = drawn(len(self.images), config.test_images, config.seed)
        made: list[Tensor] = []
        reasons: dict[int, str] = {}
        for number in chosen:
            try:
                made.append(squares.plain(self.images.read(number)))
            except UNREADABLE as e:
                reasons[number] = reason_of(e)
        left_out = ""
        if reasons:
            number = next(iter(reasons))
            left_out = (
                f"{len(reasons)} of {counted(len(chosen), 'image')} cannot be read, such as "
                f"{self.images.label(number)}: {reasons[number]}"
            )
        if not made:
            raise ValueError(left_out)
        test = torch.stack(made)
        self._pixels = hashlib.sha256(test.numpy().data).hexdigest()
        return DenseData(DenseImages(test[:0]), DenseImages(test), "images", left_out=left_out)


SOURCES: dict[str, type[DenseSource]] = {
    "scenes": ScenesSource,
    "figures": FiguresSource,
    "ade20k": ADE20KSource,
    "nyuv2": NYUv2Source,
    "coco-keypoints": CocoKeypointsSource,
}


def open_source(config: DenseConfig) -> DenseSource:
    """The data that ``config.data`` names; ValueError says what cannot be loaded."""
    kind = SOURCES.get(config.data, ImagesSource)
    if config.data in SOURCES:
        if kind.in_folder and not config.data_root:
            raise ValueError(f"data {config.data!r} lie in a folder: give it as --data-root DIR")
        if config.data_root and not kind.in_folder:
            raise ValueError(f"data {config.data!r} are made, not read: leave out data_root, got {config.data_root!r}")
    if config.test_on == "whole" and not kind.has_whole:
        able = ", ".join(name for name, each in SOURCES.items() if each.has_whole)
        raise ValueError(f"test_on must be square with data {config.data!r}; whole images are those of {able}")
    return kind(config)
