"""Images with a value of every pixel, in the folder layouts of ADE20K (labels) and of NYUv2 (depths)."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mimkernels.data import MAX_PIXELS
from mimkernels.data.pixels import Decoder, data_folder, drawn, read_levels

IGNORED = 255  # the label of pixels that do not count
NYU_DEPTHS = (0.001, 10.0)  # metres, between which depths are valid

_ADE_CLASSES = 150
_ADE_NAMES = "objectInfo150.txt"
_MOST_NAMES = 100_000  # bytes of the file of names
_PICTURES = (".jpg", ".jpeg", ".png")
_NYU_TRAIN, _NYU_TEST = ("sync", "official_splits/train", "train"), ("official_splits/test", "test")
NYU_SIZE = (480, 640)
_NYU_FRAME = (slice(45, 472), slice(43, 608))  # of these: the picture without the white border of its registration
NYU_CROP = (416, 544)  # of these: what readouts of depth are trained on
_EIGEN_CROP = (slice(45, 471), slice(41, 601))  # of 480 x 640 pixels: where NYUv2 is tested


class PixelTargets(ABC):
    """Images below one folder with a target of every pixel.

    Attributes:
        files: of every image, and of its target.
    """

    def __init__(self, name: str, root: Path, files: Sequence[tuple[Path, Path]], decoder: Decoder | None) -> None:
        self.name, self.root, self.files = name, root, list(files)
        self.decoder = decoder or Decoder()

    def __len__(self) -> int:
        return len(self.files)

    @abstractmethod
    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """An image ``[3, H, W]`` uint8, and its labels uint8 or depths fp32 ``[H, W]``; ValueError names a bad file."""

    def chosen(self, count: int, seed: int) -> list[int]:
        """`count` of the pairs at random, all if there are no more, in their order."""
        return drawn(len(self), count, seed)

    def fingerprint(self) -> str:
        """Changes with the files' names, sizes and times of change."""
        lines = []
        for path in (path for pair in self.files for path in pair):
            status = path.stat()
            lines.append(f"{path.relative_to(self.root)}/{status.st_size}/{status.st_mtime_ns}")
        return (
            f"{self.name}/{len(self)}/"
            + hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]
        )

    def _image(self, path: Path) -> Tensor:
        try:
            pixels = np.asarray(self.decoder.read(self._inside(path)).convert("RGB"))
        except (OSError, ValueError) as e:
            raise ValueError(f"image {str(path)!r} cannot be read: {e}") from e
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()

    def _levels(self, path: Path, image: Tensor) -> np.ndarray:
        try:
            levels = read_levels(self._inside(path), self.decoder.max_pixels)
        except (OSError, ValueError) as e:
            raise ValueError(f"target {str(path)!r} cannot be read: {e}") from e
        if levels.shape != tuple(image.shape[1:]):
            raise ValueError(
                f"target {str(path)!r} has {_by(levels.shape)} pixels, its image {_by(image.shape[1:])}, rows by "
                "columns"
            )
        return levels

    def _inside(self, path: Path) -> Path:
        """ValueError for a link that leads out of the folder."""
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise ValueError(f"a link out of {str(self.root)!r}, to {str(path.resolve())!r}")
        return path


class ADE20KFolder(PixelTargets):
    """One part of ADE20K as the scene parsing challenge of 2016 has it: 150 classes.

    ::

        ROOT/images/{training,validation}/NAME.jpg
        ROOT/annotations/{training,validation}/NAME.png   0: not labelled, 1..150: classes
        ROOT/objectInfo150.txt                            names of classes; without it they are numbers

    Args:
        root: the folder, often called ``ADEChallengeData2016``.
        train: training or validation.
        decoder: how images are read.

    Raises:
        ValueError: what of this is missing.
    """

    def __init__(self, root: str | Path, train: bool = True, decoder: Decoder | None = None) -> None:
        root, part = data_folder(root, "ade20k"), "training" if train else "validation"
        images, labels = root / "images" / part, root / "annotations" / part
        for folder in (images, labels):
            if not folder.is_dir():
                raise ValueError(
                    f"data 'ade20k': no folder {str(folder)!r}; {str(root)!r} must hold images/ and annotations/, "
                    "each with training/ and validation/, as ADEChallengeData2016 does"
                )
        super().__init__("ade20k", root, _by_stem(images, labels, "ade20k"), decoder)
        names = root / _ADE_NAMES
        self.classes = (
            _ade_names(self._inside(names)) if names.exists() else [str(number + 1) for number in range(_ADE_CLASSES)]
        )

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        picture, target = self.files[index]
        image = self._image(picture)
        levels = self._levels(target, image)
        if levels.max(initial=0) > _ADE_CLASSES:
            raise ValueError(f"target {str(target)!r} has a label {levels.max()}, expected at most {_ADE_CLASSES}")
        labels = levels.astype(np.uint8) - np.uint8(1)  # 0, not labelled, becomes 255
        return image, torch.from_numpy(labels)


class NYUv2Folder(PixelTargets):
    """One part of NYU Depth v2 as folders of pictures.

    ::

        ROOT/sync/**/rgb_NUMBER.jpg, sync_depth_NUMBER.png             or official_splits/train/, or train/
        ROOT/official_splits/test/**/rgb_NUMBER.jpg, sync_depth_NUMBER.png                        or test/

    or, in ``train/`` and ``test/``, ``rgb/NAME.jpg`` with ``depth/NAME.png``; images may be PNG. Depths are PNG of 16
    bits in millimetres, or in another unit that `scale` tells; 0 is no depth. Of test images of 480 x 640 pixels only
    Eigen's crop counts, rows 45 to 470 and columns 41 to 600. The ``.mat`` file is not read.

    Args:
        root: the folder, often called ``nyu_depth_v2``.
        train: training or test.
        scale: levels per metre.
        decoder: how images are read.

    Raises:
        ValueError: what of this is missing.
    """

    def __init__(
        self, root: str | Path, train: bool = True, scale: float = 1000.0, decoder: Decoder | None = None
    ) -> None:
        root, wanted = data_folder(root, "nyuv2"), _NYU_TRAIN if train else _NYU_TEST
        folder = next((root / name for name in wanted if (root / name).is_dir()), None)
        if folder is None:
            packed = sorted(path.name for path in root.glob("*.mat"))
            raise ValueError(
                f"data 'nyuv2': {str(root)!r} has no folder {' nor '.join(wanted)}"
                + (f"; {packed[0]} is not read: unpack it into pictures" if packed else "")
            )
        if (folder / "rgb").is_dir() and (folder / "depth").is_dir():
            files = _by_stem(folder / "rgb", folder / "depth", "nyuv2")
        else:
            files = _by_number(folder)
        super().__init__("nyuv2", root, files, decoder)
        self.train, self.scale = train, scale

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        picture, target = self.files[index]
        image = self._image(picture)
        levels = self._levels(target, image)
        if levels.dtype == np.uint8:
            raise ValueError(f"target {str(target)!r} has 8 bits, expected depths of 16 bits")
        depths = (levels / self.scale).astype(np.float32)
        if not self.train and depths.shape == NYU_SIZE:
            counted = np.zeros_like(depths)
            counted[_EIGEN_CROP] = depths[_EIGEN_CROP]
            depths = counted
        return image, torch.from_numpy(depths)

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}/{self.scale:g}"


def _pictures(folder: Path) -> list[Path]:
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    return [folder / name for name in names if name.lower().endswith(_PICTURES)]


def _by_stem(images: Path, targets: Path, data: str) -> list[tuple[Path, Path]]:
    """Pictures with the PNG of the same name in another folder."""
    pairs = [(path, targets / f"{path.stem}.png") for path in _pictures(images)]
    if not pairs:
        raise ValueError(f"data {data!r}: no image in {str(images)!r}: looked for {', '.join(_PICTURES)}")
    _check_targets(pairs, data)
    return pairs


def _by_number(folder: Path) -> list[tuple[Path, Path]]:
    """Pictures ``rgb_NUMBER`` below a folder with ``sync_depth_NUMBER.png`` beside them."""
    pairs = [
        (path, path.with_name(f"sync_depth_{path.stem.removeprefix('rgb_')}.png"))
        for inside in _folders(folder)
        for path in _pictures(inside)
        if path.name.startswith("rgb_")
    ]
    if not pairs:
        raise ValueError(
            f"data 'nyuv2': neither rgb/ and depth/ nor any picture rgb_NUMBER.jpg or .png in {str(folder)!r} or below "
            "it"
        )
    _check_targets(pairs, "nyuv2")
    return pairs


def _check_targets(pairs: list[tuple[Path, Path]], data: str) -> None:
    lacking = [(image, target) for image, target in pairs if not target.is_file()]
    if lacking:
        image, target = lacking[0]
        others = f", and {len(lacking) - 1:,} more of {len(pairs):,}" if len(lacking) > 1 else ""
        raise ValueError(f"data {data!r}: image {str(image)!r} has no target {str(target)!r}{others}")
    images: dict[Path, Path] = {}
    for image, target in pairs:
        first = images.setdefault(target, image)
        if first != image:
            raise ValueError(
                f"data {data!r}: images {str(first)!r} and {str(image)!r} have the same target {str(target)!r}"
            )


def _folders(folder: Path) -> Iterator[Path]:
    """A folder and those below it, in sorted order; links to folders are not followed."""
    yield folder
    for name in sorted(os.listdir(folder)):
        if (folder / name).is_dir() and not (folder / name).is_symlink() and not name.startswith("."):
            yield from _folders(folder / name)


def _ade_names(path: Path) -> list[str]:
    """The first name of each class from the table, whose columns are ``Idx Ratio Train Val Name``."""
    with path.open("rb") as file:
        lines = file.read(_MOST_NAMES).decode(errors="replace").splitlines()
    column = lines[0].split().index("Name") if lines and "Name" in lines[0].split() else None
    if column is not None:
        rows = [line.split(maxsplit=column) for line in lines[1:] if line.strip()]
        if [row[0] for row in rows] == [str(number + 1) for number in range(_ADE_CLASSES)]:
            return [row[column].split(",")[0].split(";")[0].strip() if len(row) > column else row[0] for row in rows]
    raise ValueError(
        f"{str(path)!r} is not the table of ADE20K's classes: expected columns Idx ... Name and rows 1 to "
        f"{_ADE_CLASSES}, got {len(lines)} lines, the first {lines[0][:80] if lines else ''!r}"
    )


def resized(image: Tensor, target: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """An image ``[3, H, W]`` and its target ``[H, W]`` with their shorter side at `side` pixels.

    Pixels by antialiased bilinear interpolation, labels and depths by the nearest one.

    Raises:
        ValueError: they would have more pixels than a file may have.
    """
    height, width = image.shape[1:]
    zoom = side / min(height, width)
    size = (max(side, round(height * zoom)), max(side, round(width * zoom)))
    if size == (height, width):
        return image, target
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(
            f"an image of {_by((height, width))} pixels, rows by columns, would have {_by(size)} with {side} as its "
            f"shorter side, more than {MAX_PIXELS:,}"
        )
    pixels = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    nearest = F.interpolate(target[None, None].float(), size, mode="nearest-exact")[0, 0]
    return pixels.round().clamp(0, 255).to(torch.uint8), nearest.to(target.dtype)


def middle_square(image: Tensor, target: Tensor, side: int, shorter: int | None = None) -> tuple[Tensor, Tensor]:
    """The middle `side` x `side` pixels of an image and its target that are ``resized`` to `shorter`, or to `side`."""
    image, target = resized(image, target, shorter or side)
    top, left = ((size - side) // 2 for size in image.shape[1:])
    return image[:, top : top + side, left : left + side], target[top : top + side, left : left + side]


def augmented_crop(image: Tensor, labels: Tensor, side: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A random square as readouts of segmentation are trained on: zoomed by 0.5 to 2, cropped, mirrored or not.

    At zoom 1 the shorter side of the image has `side` pixels. What lies beyond the image has its mean colour and does
    not count.
    """
    image, labels = resized(image, labels, max(1, round(side * rng.uniform(0.5, 2.0))))
    mean = image.float().mean((1, 2)).round().to(torch.uint8)
    square, target = mean[:, None, None].repeat(1, side, side), torch.full((side, side), IGNORED, dtype=labels.dtype)
    height, width = image.shape[1:]
    top, left = (int(rng.integers(max(0, size - side) + 1)) for size in (height, width))
    rows, columns = min(side, height), min(side, width)
    square[:, :rows, :columns] = image[:, top : top + side, left : left + side]
    target[:rows, :columns] = labels[top : top + side, left : left + side]
    if rng.random() < 0.5:
        square, target = square.flip(2), target.flip(1)
    return square, target


def nyu_crop(image: Tensor, depths: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A random crop as readouts of depth are trained on: 416 x 544 of 480 x 640 pixels, mirrored or not.

    It is not zoomed, so that depths stay true, and lies within rows 45 to 471 and columns 43 to 607. Of an image of
    another size it has the same share of rows and columns, and lies anywhere.
    """
    sizes = [
        max(1, round(size * part / whole)) for size, part, whole in zip(depths.shape, NYU_CROP, NYU_SIZE, strict=True)
    ]
    if tuple(depths.shape) == NYU_SIZE:
        image, depths = image[(slice(None), *_NYU_FRAME)], depths[_NYU_FRAME]
    top, left = (int(rng.integers(size - part + 1)) for size, part in zip(depths.shape, sizes, strict=True))
    rows, columns = slice(top, top + sizes[0]), slice(left, left + sizes[1])
    image, depths = image[:, rows, columns], depths[rows, columns]
    return (image.flip(2), depths.flip(1)) if rng.random() < 0.5 else (image, depths)


def with_draws(
    pairs: Iterable[tuple[Tensor, Tensor]], copies: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, np.random.Generator]]:
    """Each image and its target `copies` times, with what a crop of it is drawn from."""
    for number, (image, target) in enumerate(pairs):
        for copy in range(copies):
            yield image, target, np.random.default_rng((seed, number, copy))


def augmented_copies(
    pairs: Iterable[tuple[Tensor, Tensor]], side: int, copies: int, seed: int
) -> tuple[Tensor, Tensor]:
    """`copies` different ``augmented_crop`` of each image: ``[copies * n, 3, S, S]`` with their labels."""
    crops = [augmented_crop(image, labels, side, rng) for image, labels, rng in with_draws(pairs, copies, seed)]
    images, labels = (torch.stack(parts) for parts in zip(*crops, strict=True))
    return images, labels


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)
