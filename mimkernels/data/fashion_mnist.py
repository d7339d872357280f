"""Fashion-MNIST from files that are there already: of the Debian package, or below ``--data-root``."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch

__all__ = ["FashionMNISTSource"]

_PACKAGE = "dataset-fashion-mnist"  # of Debian and Ubuntu
_INSTALLED = Path("/usr/share/datasets/fashion-mnist")
_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
_LARGEST = 100_000_000  # bytes of a file when unpacked, twice what the larger one has


class FashionMNISTSource:
    """70,000 grey pictures of clothes, 28 x 28 pixels, in 10 classes; one part of the split: 60,000 and 10,000.

    Args:
        root: looked in first: for the four idx files themselves, in ``fashion-mnist/``, and where torchvision puts
            them; unpacked or not.
        train: the part.

    Raises:
        ValueError: the files are nowhere, or are not those of the set; names what was looked for, or the file.
    """

    name = "fashion-mnist"
    mirrored = False
    crop_scale = 0.6
    in_memory = True
    statistics: tuple[float, float] | None = (0.2860, 0.3530)  # of the training images' pixels in [0, 1]

    def __init__(self, root: str | Path = "data", train: bool = True) -> None:
        folders = [Path(root), Path(root) / "fashion-mnist", Path(root) / "FashionMNIST" / "raw", _INSTALLED]
        part = "train" if train else "t10k"
        images, labels = (_find(folders, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
        self._images = torch.from_numpy(_read(images, 3))[:, None]
        targets = _read(labels, 1)
        if self._images.shape[1:] != (1, 28, 28) or len(self._images) != len(targets) or targets.max(initial=0) > 9:
            raise ValueError(
                f"{str(images)!r} and {str(labels)!r} are not those of Fashion-MNIST: images "
                f"{list(self._images.shape)}, {len(targets)} labels up to {targets.max(initial=0)}"
            )
        self._targets = targets.tolist()
        self._part = "train" if train else "test"
        self._checksum = zlib.crc32(targets.tobytes(), zlib.crc32(self._images.numpy().tobytes()))

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> torch.Tensor:
        return self._images[index]

    def label(self, index: int) -> str:
        return f"fashion-mnist {self._part} image {index}"

    def fingerprint(self) -> str:
        return f"fashion-mnist/{self._part}/{len(self)}/{self._checksum:08x}"

    def targets(self) -> tuple[list[int], list[str]]:
        return self._targets, list(_CLASSES)


def _find(folders: list[Path], name: str) -> Path:
    for folder in folders:
        for path in (folder / f"{name}.gz", folder / name):
            if path.is_file():
                return path
    raise ValueError(
        f"data 'fashion-mnist': no {name}.gz in {', '.join(str(folder) for folder in folders)}; install the Debian "
        f"package {_PACKAGE}, name the folder of its four files with --data-root, or let torchvision download them: "
        "--data torchvision:FashionMNIST (a folder of that name is --data ./fashion-mnist)"
    )


def _read(path: Path, axes: int) -> np.ndarray:
    """The bytes of an idx file: magic number, sizes as 32-bit integers, most significant byte first, then values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(_LARGEST)
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{str(path)!r} cannot be read: {e}") from e
    header = 4 * (1 + axes)
    sizes = np.frombuffer(data[4:header], dtype=">u4").tolist() if len(data) >= header else []
    if data[:4] != bytes((0, 0, 8, axes)) or len(data) != header + math.prod(sizes):
        raise ValueError(f"{str(path)!r} is not an idx file of {axes} axes, or is damaged: {len(data):,} bytes")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(sizes).copy()
