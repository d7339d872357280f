"""Validation during training: the loss on images that are not trained on, masked in the same way every time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimkernels.data.batches import UNREADABLE, Augmentation, Pixels, Views, derived_seed, reason_of, stacked
from mimkernels.data.sources import Source
from mimkernels.engine.training.config import TrainingConfig
from mimkernels.engine.training.masks import Masks, TeacherTargets

__all__ = ["Means", "Validation"]

# Neither masks nor views depend on the run's seed: runs are compared on the same images, masked alike.
_SEED = 0
_VIEWS = 6  # stream of the seed; the others are in data/batches.py and loop.py
_KEPT = 2**31  # bytes of images that are kept; those beyond are read anew
_OFFSET = 2**41  # of the masks, far from those of training steps

Compute = Callable[[Any, dict[str, Any]], tuple[Tensor, Mapping[str, Tensor]]]


class Means(NamedTuple):
    """What is known of the validation images as a whole.

    Attributes:
        colour: ``[C]`` fp32, the mean of their pixels in [0, 1].
        shares: ``[classes]`` fp32, how many are of each class; None without labels.
    """

    colour: Tensor
    shares: Tensor | None


class _Part(NamedTuple):
    """One forward pass."""

    images: Pixels
    targets: Tensor | None
    rows: Tensor  # [B] int64, the images' numbers among those of the validation


class Validation:
    """Loss and metrics on some images of a source, the same ones and under the same masks whenever it is called.

    A loss is the mean over everything that is masked in all images under ``config.val_masks`` masks each, or over the
    images where a method masks none. The model has to be in eval mode; no random number is drawn.

    Args:
        config: ``val_images``, ``val_masks``, ``batch_size`` and the method are read.
        source: images that are not trained on; of more than ``val_images``, so many spread over the source are taken.
        augmentation: of the run; images are not augmented by it, but cropped to their central square.
        views: what a method makes of an image, if not that: drawn for each image once.
        masking: of the run; None where nothing is masked.
        features: of the run; the teacher of a target that needs one.
        model: on the CPU; draws the masks where `masking` leaves them to it.
        targets: class numbers of the source's images.
    """

    def __init__(
        self,
        config: TrainingConfig,
        source: Source,
        *,
        augmentation: Augmentation,
        views: Views,
        masking: Masks | None,
        features: TeacherTargets | None = None,
        model: Any,
        targets: list[int] | None = None,
    ) -> None:
        self.config, self.method, self.source, self.targets = config, config.the_method, source, targets
        self.features = features
        self._plain, self._views = augmentation, None if views is augmentation else views
        count = min(config.val_images, len(source))
        self.positions = [number * len(source) // count for number in range(count)]
        self._masks: Tensor | None = None  # [draws, n, h, w] bool
        if masking is not None:
            drawn = []
            for draw in range(config.val_masks):
                mask = masking.unguided(count, _SEED, _OFFSET + draw)
                drawn.append(self.method.draw_masks(model, count, _SEED, _OFFSET + draw) if mask is None else mask)
            self._masks = torch.stack(drawn)
            if not self._masks.any():
                raise ValueError(f"masking {masking.name!r} masks none of {count} validation images")
        self._parts: dict[int, _Part | None] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def masks(self) -> int:
        """Masks per image; 0 where there are none."""
        return 0 if self._masks is None else len(self._masks)

    def fingerprint(self) -> str:
        """Changes with the images and the number of their masks, upon which the numbers depend."""
        return f"{self.source.fingerprint()}, {len(self)} images, {self.masks} masks"

    def require_readable(self) -> None:
        """Raise ValueError, naming the first image and the reason, if none of the images can be read."""
        reasons = []
        for index in self.positions:
            try:
                self.source.read(index)
                return
            except UNREADABLE as e:
                reasons.append(f"{self.source.label(index)}: {reason_of(e)}")
        raise ValueError(
            f"none of the {len(self)} images of {self.source.name!r} to validate on can be read; the first, "
            f"{reasons[0]}"
        )

    def told(self) -> str:
        """Images and masks in words."""
        masks = f", {self.masks} mask{'s' if self.masks > 1 else ''} each" if self.masks else ""
        return f"{len(self):,} images of {self.source.name}{masks}"

    def sums(self, compute: Compute, device: torch.device, rank: int = 0, processes: int = 1) -> dict[str, Tensor]:
        """By name, fp64 ``[2]``: a weighted sum over this process's share of the images, and the sum of the weights.

        All processes call `compute` equally often, which sharded models need; some perhaps for nothing.
        """
        totals: dict[str, Tensor] = {}
        parts = -(-len(self) // self.config.batch_size)
        with torch.no_grad():
            for first in range(0, parts, processes):
                part = self._part(first + rank) if first + rank < parts else None
                for draw in range(max(1, self.masks)):
                    images, arguments, weight = self._call(part, draw, device)
                    loss, metrics = compute(images, arguments)
                    seen = 0 if part is None else len(part.rows)
                    for name, value in {"loss": loss, **metrics}.items():
                        count = weight if name.startswith("loss") else seen  # also the losses of several targets
                        term = torch.stack((value.double() * count, value.new_full((), count, dtype=torch.float64)))
                        totals[name] = totals.get(name, torch.zeros_like(term)) + (term if count else 0)
        return totals

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Means of what all processes have summed; NaN where no image could be read."""
        return {name: (total[0] / total[1]).item() for name, total in sums.items()}

    def measure(self, model: Any, device: torch.device) -> dict[str, float]:
        """Loss and metrics of a model in eval mode, by this process alone."""
        return self.values(self.sums(calling(model), device))

    def means(self) -> Means:
        """What is known of all images that this process reads; it reads them all."""
        total, count, classes = torch.zeros(self._plain.in_chans, dtype=torch.float64), 0, self.config.num_classes
        shares = torch.zeros(classes or 0, dtype=torch.float64)
        for number in range(-(-len(self) // self.config.batch_size)):
            part = self._part(number)
            if part is None:
                continue
            images = part.images[0] if isinstance(part.images, tuple) else part.images
            total += images.double().mean((2, 3)).sum(0)
            count += len(images)
            if part.targets is not None:
                shares += torch.bincount(part.targets, minlength=len(shares))
        colour = (total / max(1, count) / 255).float()
        return Means(colour, None if self.targets is None else (shares / max(1, count)).float())

    def _part(self, number: int) -> _Part | None:
        """The images of a forward pass, read once and kept where there is room; None if none can be read."""
        if number not in self._parts:
            pixels, rows = [], []
            size = self.config.batch_size
            for row in range(number * size, min(len(self), (number + 1) * size)):
                index = self.positions[row]
                try:
                    image = self.source.read(index)
                    seed = derived_seed(_SEED, _VIEWS, index)
                    pixels.append(self._plain.plain(image) if self._views is None else self._views(image, seed))
                    rows.append(row)
                except UNREADABLE as e:
                    text = f"cannot read {self.source.label(index)}, validation goes without it: {reason_of(e)}"
                    warnings.warn(text, stacklevel=2)
            targets = None if self.targets is None else [self.targets[self.positions[row]] for row in rows]
            part = (
                _Part(stacked(pixels), None if targets is None else torch.tensor(targets), torch.tensor(rows))
                if rows
                else None
            )
            views = () if part is None else part.images if isinstance(part.images, tuple) else (part.images,)
            self._bytes += sum(view.nbytes for view in views)
            if self._bytes > _KEPT:
                return part
            self._parts[number] = part
        return self._parts[number]

    def _call(self, part: _Part | None, draw: int, device: torch.device) -> tuple[Any, dict[str, Any], int]:
        """What the model is called with, and the weight of its loss: 0 of a call that only keeps others company."""
        mask = None
        if part is not None and self._masks is not None:
            mask = self._masks[draw, part.rows]
        weight = 0 if part is None else len(part.rows) if mask is None else int(mask.sum())
        if not weight:
            part = self._black()
            if self._masks is not None:
                masks = self._masks.flatten(0, 1)
                mask = masks[masks.flatten(1).any(1)][:1]
        assert part is not None
        images = part.images
        images = tuple(view.to(device) for view in images) if isinstance(images, tuple) else images.to(device)
        targets = None if part.targets is None else part.targets.to(device)
        images, arguments = self.method.call(self.config, images, targets, seed=_SEED, training=False)
        if self.features is not None:
            arguments |= self.features.arguments(images, mask)
        if mask is not None:
            arguments["mask"] = mask.to(device) if self.method.sees_all else mask
        return images, arguments, weight

    def _black(self) -> _Part:
        side = self._plain.img_size
        image = torch.zeros(self._plain.in_chans, side, side, dtype=torch.uint8)
        pixels = image if self._views is None else self._views(image, _SEED)
        targets = None if self.targets is None else torch.zeros(1, dtype=torch.int64)
        return _Part(stacked([pixels]), targets, torch.zeros(1, dtype=torch.int64))


def calling(model: Any) -> Compute:
    """Loss and metrics of what a model gives."""

    def compute(images: Any, arguments: dict[str, Any]) -> tuple[Tensor, Mapping[str, Tensor]]:
        out = model(images, **arguments)
        return out.loss, getattr(out, "metrics", {})

    return compute
