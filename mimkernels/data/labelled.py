"""Labelled images of a source as a frozen encoder reads them: some of them, in order, as batches."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mimkernels.data.batches import AUGMENT, UNREADABLE, Augmentation, derived_seed, reason_of, start_worker
from mimkernels.data.sources import FolderSource, Source

__all__ = ["EncoderBatch", "EncoderImages", "LabelledImages", "collate_images", "in_order"]


@dataclass
class LabelledImages:
    """Some images of a source, with their class numbers."""

    source: Source
    indices: np.ndarray  # [n] numbers of the images in the source
    targets: torch.Tensor  # [n] int64

    def __len__(self) -> int:
        return len(self.indices)

    def label(self, position: int) -> str:
        return self.source.label(int(self.indices[position]))

    def unread(self, broken: Sequence[tuple[int, str]], what: str = "images") -> str:
        """How many cannot be read, by position and reason, such as which and why."""
        position, reason = broken[0]
        return f"{len(broken)} of {len(self)} {what} cannot be read, such as {self.label(position)}: {reason}"

    def without(self, positions: Sequence[int]) -> "LabelledImages":
        keep = np.setdiff1d(np.arange(len(self)), np.asarray(positions, dtype=int))
        return LabelledImages(self.source, self.indices[keep], self.targets[torch.from_numpy(keep)])

    def fingerprint(self) -> str:
        """Changes with the images that there are, and the sizes and times of change of their files: what is kept of
        them is then old."""
        chosen = hashlib.sha256(self.indices.astype("<i8").tobytes() + self.targets.numpy().astype("<i8").tobytes())
        if isinstance(self.source, FolderSource):
            chosen.update(np.array([self.source.state(index) for index in self.indices.tolist()], "<i8").tobytes())
        return f"{self.source.fingerprint()}/{len(self)}/{chosen.hexdigest()[:16]}"


class EncoderBatch(NamedTuple):
    """Readable images of a batch, their positions in the split, and what could not be read."""

    images: torch.Tensor | None  # [B, C, H, W] uint8; None if there are none
    positions: torch.Tensor  # [B] int64
    broken: list[tuple[int, str]]  # (position, reason)


class EncoderImages(Dataset):
    """Images by (epoch, position), augmented or not."""

    def __init__(self, images: LabelledImages, augmentation: Augmentation, seed: int, augment: bool) -> None:
        self.images, self.augmentation, self.seed, self.augment = images, augmentation, seed, augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor | None, int, str]:
        epoch, position = key
        try:
            image = self.images.source.read(int(self.images.indices[position]))
            if self.augment:
                return self.augmentation(image, derived_seed(self.seed, AUGMENT, epoch, position)), position, ""
            return self.augmentation.plain(image), position, ""
        except UNREADABLE as e:
            return None, position, reason_of(e)


def collate_images(samples: list[tuple[torch.Tensor | None, int, str]]) -> EncoderBatch:
    read = [(image, position) for image, position, _ in samples if image is not None]
    broken = [(position, reason) for image, position, reason in samples if image is None]
    positions = torch.tensor([position for _, position in read], dtype=torch.int64, device="cpu")
    return EncoderBatch(torch.stack([image for image, _ in read]) if read else None, positions, broken)


def in_order(images: EncoderImages, batch_size: int, workers: int, pin_memory: bool) -> DataLoader:
    """Every image once, in order, the last batch shorter."""
    return DataLoader(
        images,
        batch_size=batch_size,
        sampler=[(0, position) for position in range(len(images))],
        collate_fn=collate_images,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
    )
