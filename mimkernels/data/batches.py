"""Batches: deterministic order, deterministic augmentation, broken images replaced.

Nothing here has state that a checkpoint would need to hold. What batch ``t`` contains is a function of the
seed and ``t`` alone: the order of an epoch is drawn from (seed, epoch), an image's augmentation from (seed, epoch,
index), so that a resumed run sees the same bits whatever the number of workers.
"""

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from mimkernels.data.pixels import eight_bits
from mimkernels.data.sources import Source

# So many unreadable images in a row mean that the folder is wrong, not that some files are.
_MAX_BROKEN_IN_A_ROW = 1000

# What a damaged image raises; SyntaxError is Pillow's for a PNG.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)

_ORDER, AUGMENT, _REPLACE = 1, 2, 3  # streams that one seed is split into


def derived_seed(*numbers: int) -> int:
    """A 63-bit seed from several numbers; neighbours give unrelated seeds."""
    words = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])


@contextlib.contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """What draws from a global generator of Python, numpy or torch (CPU) draws from `seed`; they are restored."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # Not torch.manual_seed: it would also reseed the accelerators of the training process.
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


# Pixels that a model is trained on: one tensor, or one for each of several views.
Pixels = torch.Tensor | tuple[torch.Tensor, ...]


class Views(Protocol):
    """What is made of an image: uint8 ``[C, S, S]``, or a tuple of several, whose sizes may differ.

    The same bits for the same seed, whatever the process; the global generators are left as they were.
    """

    def __call__(self, image: Image.Image | torch.Tensor, seed: int) -> Pixels: ...


class Sample(NamedTuple):
    """One training image."""

    pixels: Pixels | None  # None if no image could be read
    broken: list[tuple[int, str]]  # (index, reason)
    target: int | None = None  # class number, where images are read with labels


class Batch(NamedTuple):
    """What a worker hands over."""

    images: Pixels | None  # [B, C, H, W] uint8, or a tuple of one per view; None if no image could be read
    broken: list[tuple[int, str]]  # (index, reason)
    targets: torch.Tensor | None = None  # [B] int64, where images are read with labels


class Augmentation:
    """Random resized crop and mirroring, as in MAE; images stay uint8.

    Images are resized as tensors, which takes half the time that Pillow takes.
    """

    def __init__(self, img_size: int, in_chans: int, crop_scale: float, hflip: bool) -> None:
        self.img_size, self.in_chans, self.crop_scale, self.hflip = img_size, in_chans, crop_scale, hflip
        steps: list[v2.Transform] = []
        if crop_scale < 1:
            bicubic = InterpolationMode.BICUBIC
            steps.append(v2.RandomResizedCrop(img_size, scale=(crop_scale, 1.0), interpolation=bicubic, antialias=True))
        if hflip:
            steps.append(v2.RandomHorizontalFlip())
        self._random = v2.Compose(steps) if steps else None
        self._crops = crop_scale < 1

    def __call__(self, image: Image.Image | torch.Tensor, seed: int) -> torch.Tensor:
        """uint8 ``[C, S, S]``, the same bits for the same seed; the global generator is left as it was."""
        pixels = to_pixels(image, self.in_chans) if self._crops else self.plain(image)
        if self._random is not None:
            with torch.random.fork_rng(devices=[]):
                # Not torch.manual_seed: it would also reseed the accelerators of the training process.
                torch.default_generator.manual_seed(seed)
                pixels = self._random(pixels)
        return pixels.contiguous()

    def plain(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        """The central square, resized."""
        pixels = to_pixels(image, self.in_chans)
        height, width = pixels.shape[-2:]
        side = min(height, width)
        pixels = v2.functional.center_crop_image(pixels, [side, side]) if height != width else pixels
        size = [self.img_size, self.img_size]
        return v2.functional.resize_image(pixels, size, InterpolationMode.BICUBIC, antialias=True).contiguous()


def to_pixels(image: Image.Image | torch.Tensor, in_chans: int) -> torch.Tensor:
    """uint8 ``[in_chans, H, W]``."""
    converted = to_mode(image, in_chans)
    return converted if isinstance(converted, torch.Tensor) else v2.functional.pil_to_tensor(converted)


def to_mode(image: Image.Image | torch.Tensor, in_chans: int) -> Image.Image | torch.Tensor:
    """Colour or grey, 8 bits per channel."""
    if isinstance(image, torch.Tensor):
        if image.shape[0] == in_chans:
            return image
        return image.expand(3, -1, -1) if in_chans == 3 else v2.functional.rgb_to_grayscale(image)
    return eight_bits(image).convert("RGB" if in_chans == 3 else "L")


class PretrainImages(Dataset):
    """Augmented images by (epoch, index). An image that cannot be read is replaced by another one.

    Args:
        source: where they come from.
        views: what is made of an image, such as an ``Augmentation``.
        seed: of the run; every epoch draws other views.
        targets: class numbers of all images, which then go with them; None: without labels.
    """

    def __init__(self, source: Source, views: Views, seed: int, targets: Sequence[int] | None = None) -> None:
        self.source, self.views, self.seed, self.targets = source, views, seed, targets

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        broken: list[tuple[int, str]] = []
        for candidate in self._candidates(epoch, index):
            try:
                image = self.source.read(candidate)
                pixels = self.views(image, derived_seed(self.seed, AUGMENT, epoch, index))
            except UNREADABLE as e:
                broken.append((candidate, reason_of(e)))
            else:
                return Sample(pixels, broken, None if self.targets is None else self.targets[candidate])
        return Sample(None, broken)

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        yield index
        start = derived_seed(self.seed, _REPLACE, epoch, index)
        for k in range(min(len(self), _MAX_BROKEN_IN_A_ROW)):
            yield (start + k) % len(self)


def reason_of(error: Exception) -> str:
    # Their own texts end in the file's path or the stream's address, which the caller names already.
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or a format that Pillow does not know"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip() or type(error).__name__


def collate(samples: list[Sample]) -> Batch:
    broken = [entry for sample in samples for entry in sample.broken]
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    if len(pixels) < len(samples):
        return Batch(None, broken)
    targets = [sample.target for sample in samples if sample.target is not None]
    return Batch(stacked(pixels), broken, torch.tensor(targets, dtype=torch.int64, device="cpu") if targets else None)


def stacked(pixels: Sequence[Pixels]) -> Pixels:
    """Images as one tensor, or as a tuple of one per view."""
    first = pixels[0]
    if isinstance(first, torch.Tensor):
        return torch.stack([image for image in pixels if isinstance(image, torch.Tensor)])
    return tuple(torch.stack(list(view)) for view in zip(*pixels, strict=True))


class BatchPlan:
    """Which images each forward pass of each process takes, from any step on, across epochs.

    An epoch is a permutation cut into pieces of ``batch_size``; the pieces go to (step, accumulation, process) in
    this order. Processes and accumulation are therefore interchangeable: 2 processes, or 1 process with 2 accumulation
    steps, take the same pieces in the same optimizer step. The incomplete last step of an epoch is dropped, as in MAE.
    """

    def __init__(self, length: int, batch_size: int, accum_steps: int, processes: int, seed: int) -> None:
        self.length, self.batch_size, self.accum_steps = length, batch_size, accum_steps
        self.processes, self.seed = processes, seed
        self.steps_per_epoch = length // self.effective_batch
        if self.steps_per_epoch == 0:
            images = f"{length} image{'' if length == 1 else 's'}"
            raise ValueError(
                f"the data holds {images}, fewer than one optimizer step takes: {self.effective_batch} = "
                f"batch_size {batch_size} x accum_steps {accum_steps} x {processes} process(es); lower --batch-size"
            )

    @property
    def effective_batch(self) -> int:
        return self.batch_size * self.accum_steps * self.processes

    def piece(self, step: int, accum: int, rank: int) -> int:
        """Running number of a forward pass over the whole run: the offset of its masks."""
        return (step * self.accum_steps + accum) * self.processes + rank

    def batches(self, rank: int, first_step: int, last_step: int) -> Iterator[list[tuple[int, int]]]:
        """(epoch, index) pairs of each forward pass of process ``rank``, steps ``first_step`` to ``last_step - 1``."""
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(first_step, last_step):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = np.random.default_rng(derived_seed(self.seed, _ORDER, epoch)).permutation(self.length)
            for accum in range(self.accum_steps):
                begin = self.piece(step % self.steps_per_epoch, accum, rank) * self.batch_size
                yield [(epoch, int(index)) for index in order[begin : begin + self.batch_size]]


class _Stream:
    """A batch sampler for DataLoader; one pass over it is the whole run, so workers never restart between epochs."""

    def __init__(self, plan: BatchPlan, rank: int, first_step: int, last_step: int) -> None:
        self._arguments = (plan, rank, first_step, last_step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan, rank, first_step, last_step = self._arguments
        return plan.batches(rank, first_step, last_step)

    def __len__(self) -> int:
        plan, _, first_step, last_step = self._arguments
        return (last_step - first_step) * plan.accum_steps


def start_worker(_: int) -> None:
    # Ctrl-C, and SIGTERM from the likes of `timeout`, reach the whole process group; the training process alone decides
    # when to stop and still needs its batches.
    os.setpgrp()
    torch.set_num_threads(1)


def make_loader(
    images: Dataset,
    plan: BatchPlan,
    *,
    rank: int,
    first_step: int,
    last_step: int,
    workers: int,
    pin_memory: bool,
    collate_fn: Callable[[list], Any] = collate,
) -> DataLoader:
    """One iterator over all remaining forward passes of this process."""
    return DataLoader(
        images,
        batch_sampler=_Stream(plan, rank, first_step, last_step),
        collate_fn=collate_fn,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
        prefetch_factor=4 if workers else None,
    )


def require_readable(images: PretrainImages) -> None:
    """Read images until one can be read, so that a folder of broken files is refused before anything is written.

    Raises:
        ValueError: none of those tried can be read; names the first, and the reason.
    """
    sample = images[(0, 0)]
    if sample.pixels is None:
        raise ValueError(all_broken_message(images.source, sample.broken))


def all_broken_message(source: Source, broken: list[tuple[int, str]]) -> str:
    index, reason = broken[0]
    tried = len({i for i, _ in broken})
    return (
        f"none of the {tried} images tried in {source.name!r} could be read; the first, {source.label(index)}: {reason}"
    )


def picture_batch(source: Source, augmentation: Augmentation, count: int) -> tuple[torch.Tensor, list[int]]:
    """``count`` readable images spread over the source, uint8 ``[n, C, S, S]``, not augmented, and their numbers."""
    chosen: list[torch.Tensor] = []
    numbers: list[int] = []
    stride = max(1, len(source) // max(count, 1))
    for index in range(0, len(source), stride):
        if len(chosen) == count:
            break
        with contextlib.suppress(*UNREADABLE):
            chosen.append(augmentation.plain(source.read(index)))
            numbers.append(index)
    return torch.stack(chosen) if chosen else torch.empty(0, device="cpu"), numbers
