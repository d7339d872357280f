"""Where images come from: digits, Fashion-MNIST, a folder, a torchvision set. A source reads image i; no randomness."""

import contextlib
import difflib
import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from mimkernels.data.fashion_mnist import FashionMNISTSource
from mimkernels.data.pixels import IMAGE_EXTENSIONS, Decoder

# Sets whose classes change when an image is mirrored.
_NOT_MIRRORED = ("MNIST", "QMNIST", "EMNIST", "KMNIST", "FashionMNIST", "USPS", "SVHN", "Omniglot", "GTSRB")

# Where torchvision's sets keep their class numbers.
_TARGET_NAMES = ("targets", "labels", "_labels")

_NAMED = ("digits", "fashion-mnist")

# scikit-learn's digits: training on the first 1500 leaves 297 images for the pictures.
_DIGITS_TRAIN = 1500


# A folder is warned of as nearly black if, of this many 16-bit images, none reaches this level, an eighth of white.
_FILES_SAMPLED, _BRIGHT = 8, 2**13


class Source(Protocol):
    """Images by number."""

    name: str
    mirrored: bool  # is a mirrored image still a sensible one
    crop_scale: float  # smallest area of a random crop that keeps the content recognisable
    in_memory: bool  # reading decodes nothing
    statistics: tuple[float, float] | None  # mean and deviation of grey pixels in [0, 1], where they are known

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image | torch.Tensor:
        """A PIL image or a uint8 tensor ``[C, H, W]``; OSError or ValueError where it cannot be read."""

    def label(self, index: int) -> str:
        """How to name image ``index`` to a person."""

    def fingerprint(self) -> str:
        """Changes when the names of the images, what is made of their values, or their order change.

        Files themselves are not looked at: of a million images that takes minutes on some file systems.
        """

    def targets(self) -> tuple[list[int], list[str]]:
        """The class number of every image, and the classes' names; ValueError where images have no class."""


class DigitsSource:
    """1797 handwritten digits of 8 x 8 pixels, part of scikit-learn; one half of the split."""

    name = "digits"
    mirrored = False
    crop_scale = 0.6
    in_memory = True
    statistics: tuple[float, float] | None = None

    def __init__(self, train: bool = True) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as e:
            raise ValueError(f"data 'digits' needs scikit-learn ({e}): pip install 'mimkernels[train]'") from e
        digits = load_digits()
        part = slice(_DIGITS_TRAIN) if train else slice(_DIGITS_TRAIN, None)
        # Grey levels are 0..16.
        levels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        self._images = torch.from_numpy(levels[part])[:, None]
        self._targets = digits.target[part].tolist()

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> torch.Tensor:
        return self._images[index]

    def label(self, index: int) -> str:
        return f"digit {index}"

    def fingerprint(self) -> str:
        return f"digits/{len(self)}"

    def targets(self) -> tuple[list[int], list[str]]:
        return self._targets, [str(digit) for digit in range(10)]


class FolderSource:
    """Every image below a folder, in sorted order; class folders or none makes no difference.

    Links to files and folders are followed, but for one to a folder that it lies in. What its name calls an image and
    cannot be read as one (a broken link, a FIFO) counts as a broken image.

    Args:
        folder: where the images are.
        decoder: what becomes of a file's pixels, and which files are refused; ``Decoder`` has the table.

    Raises:
        ValueError: no such folder, or no image in it.
    """

    mirrored = True
    crop_scale = 0.2
    in_memory = False
    statistics: tuple[float, float] | None = None

    def __init__(self, folder: str | Path, decoder: Decoder | None = None) -> None:
        self.folder = Path(folder)
        self.name = str(folder)
        self.decoder = decoder or Decoder()
        if not self.folder.exists():
            raise ValueError(f"image folder {str(folder)!r} does not exist (looked for {self.folder.absolute()})")
        if not self.folder.is_dir():
            raise ValueError(
                f"data must be a folder of images, {', '.join(map(repr, _NAMED))} or 'torchvision:NAME'; "
                f"{str(folder)!r} is a file"
            )
        self.files = sorted(_image_files(self.folder))
        if not self.files:
            raise ValueError(
                f"no images in {str(folder)!r} or below it: looked for files ending in {', '.join(IMAGE_EXTENSIONS)}"
            )
        self._warn_if_dark()

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Image.Image:
        return self.decoder.read(self.folder / self.files[index])

    def state(self, index: int) -> tuple[int, int]:
        """Bytes of the file of image `index`, and nanoseconds when it was changed; -1 where there is none any more."""
        try:
            status = (self.folder / self.files[index]).stat()
        except OSError:  # such as a link to nowhere
            return -1, -1
        return status.st_size, status.st_mtime_ns

    def _warn_if_dark(self) -> None:
        """Warn of files of 16 bits that hold values of fewer, such as 12: their images become nearly black."""
        if self.decoder.pixel_range is not None:
            return
        levels = []
        for name in self.files[:: -(-len(self.files) // _FILES_SAMPLED)]:
            with contextlib.suppress(OSError, ValueError):
                levels.append(self.decoder.highest_level(self.folder / name))
        highest = max((level for level in levels if level is not None), default=_BRIGHT)
        if highest < _BRIGHT:
            full = 2 ** max(1, highest.bit_length()) - 1
            warnings.warn(
                f"{self.name}: grey images of 16 bits reach {highest} of 65535 here and become nearly black; if they "
                f"hold values of fewer bits, give their range, such as --pixel-range 0,{full}",
                stacklevel=3,
            )

    def label(self, index: int) -> str:
        return str(self.folder / self.files[index])

    def fingerprint(self) -> str:
        names = "\n".join(self.files).encode(errors="surrogateescape")
        values = f"/{self.decoder.pixel_range}" if self.decoder.pixel_range else ""
        return f"folder/{len(self)}/{hashlib.sha256(names).hexdigest()[:16]}{values}"

    def targets(self) -> tuple[list[int], list[str]]:
        """The folder directly below this one is an image's class."""
        folders = [name.partition("/")[0] if "/" in name else None for name in self.files]
        if None in folders:
            stray = self.files[folders.index(None)]
            raise ValueError(
                f"{self.name!r} has images outside class folders, such as {stray!r}: labels are the names of the "
                "folders directly below it"
            )
        named = [folder for folder in folders if folder is not None]
        classes = sorted(set(named))
        with os.scandir(self.folder) as entries:
            others = {entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry)}
        empty = sorted(others - set(classes))
        if empty:
            shown = ", ".join(map(repr, empty[:4])) + (", ..." if len(empty) > 4 else "")
            # Of this line, whoever asks, so that it is shown once.
            warnings.warn(f"{self.name}: folders without images are no classes: {shown}", stacklevel=1)
        numbers = {name: number for number, name in enumerate(classes)}
        return [numbers[folder] for folder in named], classes


def _image_files(folder: Path) -> Iterator[str]:
    """Files below `folder` that are named like images, relative to it, in no order."""
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while pending:
        inside, above = pending.pop()
        place = folder / inside
        try:
            status = place.stat()
            here = (status.st_dev, status.st_ino)
            if here in above:  # a ring of links; two links to one folder are two folders
                continue
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if _is_folder(entry):
                        pending.append((f"{inside}{entry.name}/", (*above, here)))
                    elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
                        yield inside + entry.name
        except OSError as e:
            if not inside:
                raise ValueError(f"image folder {str(folder)!r} cannot be read: {e.strerror}") from e
            warnings.warn(f"cannot read the folder {place}, its images are left out: {e.strerror}", stacklevel=3)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


class TorchvisionSource:
    """A torchvision classification set by its class name. Downloaded on first use."""

    crop_scale = 0.2
    in_memory = False
    statistics: tuple[float, float] | None = None

    def __init__(self, name: str, root: str | Path, train: bool = True) -> None:
        import inspect

        from torchvision import datasets

        kinds = [kind for kind in datasets.__all__ if inspect.isclass(getattr(datasets, kind))]
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, n=3)
            raise ValueError(
                f"torchvision has no dataset {name!r}" + (f": did you mean {' or '.join(close)}?" if close else "")
            )
        parameters = inspect.signature(getattr(datasets, name)).parameters
        options: dict = {}
        if "train" in parameters:
            options["train"] = train
        elif "split" in parameters:
            options["split"] = "train" if train else "test"
        if name == "EMNIST":
            options["split"] = "balanced"
            options["train"] = train
        if "download" in parameters:
            options["download"] = True
        try:
            self._set = getattr(datasets, name)(str(root), **options)
        except Exception as e:  # each set reports a missing or refused download in its own way
            raise ValueError(f"torchvision:{name} could not be opened in {str(root)!r}: {e}") from e
        self.name = f"torchvision:{name}"
        self.mirrored = name not in _NOT_MIRRORED
        self.split = "train" if train else "test"

    def __len__(self) -> int:
        return len(self._set)

    def read(self, index: int) -> Image.Image:
        item = self._set[index]
        return item[0] if isinstance(item, tuple) else item

    def label(self, index: int) -> str:
        return f"{self.name} {self.split} image {index}"

    def fingerprint(self) -> str:
        return f"{self.name}/{self.split}/{len(self)}"

    def targets(self) -> tuple[list[int], list[str]]:
        stored = next((getattr(self._set, name) for name in _TARGET_NAMES if hasattr(self._set, name)), None)
        if stored is None:  # not kept apart from the images
            stored = [self._set[index][1] for index in range(len(self))]
        try:
            numbers = [int(value) for value in stored]
        except (TypeError, ValueError) as e:
            raise ValueError(f"{self.name} has no class numbers: its first label is {stored[0]!r}") from e
        names = [str(name) for name in getattr(self._set, "classes", [])]
        count = max(numbers) + 1
        return numbers, names if len(names) >= count else [str(number) for number in range(count)]


class SubsetSource:
    """Some images of another source."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices  # [n] numbers of the images in the source
        self.name, self.mirrored, self.crop_scale = source.name, source.mirrored, source.crop_scale
        self.in_memory, self.statistics = source.in_memory, source.statistics

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Image.Image | torch.Tensor:
        return self.source.read(int(self.indices[index]))

    def label(self, index: int) -> str:
        return self.source.label(int(self.indices[index]))

    def fingerprint(self) -> str:
        chosen = hashlib.sha256(self.indices.astype("<i8").tobytes()).hexdigest()[:16]
        return f"{self.source.fingerprint()}/{len(self)}/{chosen}"

    def targets(self) -> tuple[list[int], list[str]]:
        numbers, classes = self.source.targets()
        return [numbers[index] for index in self.indices.tolist()], classes


def is_named(data: str) -> bool:
    """Whether ``--data`` names a set, not a folder."""
    return data in _NAMED or data.startswith("torchvision:")


def open_source(data: str, root: str = "data", decoder: Decoder | None = None) -> Source:
    """The training images named by ``--data``; `decoder` is for the files of a folder."""
    if data == "digits":
        return DigitsSource()
    if data == "fashion-mnist":
        return FashionMNISTSource(root)
    if data.startswith("torchvision:"):
        return TorchvisionSource(data.removeprefix("torchvision:"), root)
    return FolderSource(data, decoder)


def open_held_out(data: str, root: str = "data") -> Source | None:
    """Images that are not trained on, where the data has a fixed split; None for a plain folder."""
    if data == "digits":
        return DigitsSource(train=False)
    if data == "fashion-mnist":
        return FashionMNISTSource(root, train=False)
    if data.startswith("torchvision:"):
        try:
            return TorchvisionSource(data.removeprefix("torchvision:"), root, train=False)
        except ValueError:  # a set with one split only
            return None
    return None


def hold_out(source: Source, share: float) -> tuple[Source, Source]:
    """`source` without a share of its images, and that share: those with the smallest hashes of their names.

    The choice does not depend on the order of the files, and adding a file moves few others.
    """
    count = min(len(source) - 1, max(1, round(share * len(source))))
    if count < 1:
        raise ValueError(f"{source.name!r} has {len(source)} image: none can be held out")
    keys = name_hashes(source)
    chosen = np.zeros(len(source), dtype=bool)
    chosen[sorted(range(len(source)), key=keys.__getitem__)[:count]] = True
    return SubsetSource(source, np.flatnonzero(~chosen)), SubsetSource(source, np.flatnonzero(chosen))


def name_hashes(source: Source) -> list[bytes]:
    """A hash of every image's name, that of a file within its folder."""
    root = str(getattr(source, "folder", ""))
    names = (source.label(index).removeprefix(root) for index in range(len(source)))
    return [hashlib.sha256(name.encode(errors="surrogateescape")).digest() for name in names]


def class_numbers(source: Source, other: str, classes: Sequence[str]) -> list[int]:
    """The images' classes by the numbers that they have among `classes`, those of the set named `other`.

    Raises:
        ValueError: a class is not among them; names it.
    """
    numbers, names = source.targets()
    known = {name: number for number, name in enumerate(classes)}
    for name in names:
        if name not in known:
            raise ValueError(
                f"{source.name!r} has a class {name!r} that {other!r} has not; it has "
                f"{', '.join(classes[:8])}{', ...' if len(classes) > 8 else ''}"
            )
    return [known[names[number]] for number in numbers]
