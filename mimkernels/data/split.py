"""Images with labels, for probing and fine-tuning: the split into training and test images."""

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from mimkernels.data.labelled import LabelledImages
from mimkernels.data.pixels import Decoder
from mimkernels.data.sources import (
    FolderSource,
    Source,
    class_numbers,
    is_named,
    name_hashes,
    open_held_out,
    open_source,
)

_TEST_FOLDERS = ("val", "validation", "valid", "test")


class SplitChoice(Protocol):
    """Which images a command takes, as its settings say; ``ProbeConfig`` tells what they mean."""

    data: str
    data_root: str
    val_data: str | None
    val_share: float
    max_pixels: int

    @property
    def pixel_range(self) -> str | None: ...


class Split(NamedTuple):
    """What a probe trains on, what it is tested on, and how the two came about."""

    train: LabelledImages
    test: LabelledImages
    classes: list[str]
    description: str


def own_split(data: str) -> tuple[Path, Path] | None:
    """The folders of training and test images in the folder `data`; None where it has no such two."""
    folder = Path(data)
    tests = [folder / name for name in _TEST_FOLDERS if (folder / name).is_dir()]
    return (folder / "train", tests[0]) if not is_named(data) and (folder / "train").is_dir() and tests else None


def open_part(data: str, root: str = "data", *, test: bool = True, decoder: Decoder | None = None) -> Source:
    """The test images that ``--data`` names, all of it where it has no such part; without `test`, those to train on."""
    own = own_split(data)
    if own is not None:
        return FolderSource(own[test], decoder)
    held_out = open_held_out(data, root) if test else None
    return held_out or open_source(data, root, decoder)


def open_split(config: SplitChoice, pixel_range: str = "auto") -> Split:
    """Training and test images of ``--data``; the same on every run, whatever the seed.

    Args:
        pixel_range: to take where ``config.pixel_range`` is None.

    Raises:
        ValueError: no such data, no labels, fewer than two classes, or a class of the test that training lacks.
    """
    own = own_split(config.data)
    decoder = Decoder.from_settings(config.max_pixels, config.pixel_range or pixel_range)
    train: Source = FolderSource(own[0], decoder) if own else open_source(config.data, config.data_root, decoder)
    test: Source | None
    if config.val_data is not None:
        test, how = FolderSource(config.val_data, decoder), f"tested on {config.val_data}"
    elif own:
        test, how = FolderSource(own[1], decoder), f"tested on its folder {own[1].name}"
    else:
        test, how = open_held_out(config.data, config.data_root), "tested on the set's own test images"
    numbers, classes = train.targets()
    if len(classes) < 2:
        raise ValueError(f"{train.name!r} has {len(classes)} class: at least 2 are needed")
    targets = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    everything = np.arange(len(train))
    if test is not None:
        split = (
            LabelledImages(train, everything, targets),
            LabelledImages(
                test, np.arange(len(test)), torch.tensor(class_numbers(test, train.name, classes), device="cpu")
            ),
        )
    else:
        held_out = _held_out(train, targets, config.val_share)
        kept, tested = (
            LabelledImages(train, everything[part], targets[torch.from_numpy(part)]) for part in (~held_out, held_out)
        )
        split = kept, tested
        how = f"tested on {config.val_share:.0%} of every class, chosen by file name"
    return Split(*split, classes, how)


def _held_out(source: Source, targets: torch.Tensor, share: float) -> np.ndarray:
    """Which images are for the test, ``[n]`` bool: in every class those with the smallest hash of their names.

    The choice does not depend on the order of the files, and adding a file moves few others. Every class keeps an image
    to train on.
    """
    keys = name_hashes(source)
    chosen = np.zeros(len(source), dtype=bool)
    for number in targets.unique():
        members = sorted((targets == number).nonzero().flatten().tolist(), key=keys.__getitem__)
        chosen[members[: min(len(members) - 1, max(1, round(share * len(members))))]] = True
    if not chosen.any():
        raise ValueError(f"{source.name!r} has one image per class: none can be held out for the test")
    return chosen
