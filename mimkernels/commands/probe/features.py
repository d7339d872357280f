"""What the frozen encoder makes of every image: encoded once, and kept where it fits."""

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from mimkernels.data.labelled import EncoderImages, LabelledImages, in_order
from mimkernels.engine.command import TrainingError
from mimkernels.engine.encoder import FrozenEncoder
from mimkernels.engine.progress import Progress, count, duration
from mimkernels.nn import Pooling

# Reported once in a while, however long the encoder takes.
_SECONDS_BETWEEN_NOTES = 10


class Encoded(NamedTuple):
    """A batch as probes take it: tokens, or vectors that were pooled before, on the device."""

    positions: Tensor  # [B] int64 on the CPU
    targets: Tensor  # [B] int64
    tokens: Tensor | None  # [B, N, D] fp32
    cls_attention: Tensor | None  # [B, H, N] fp32
    pooled: dict[str, Tensor]  # [B, D'] by pooling


@dataclass
class Features:
    """Features of one half of the split, in its order, on the CPU; images that could not be read are left out."""

    images: LabelledImages
    pooled: dict[str, Tensor] = field(default_factory=dict)  # [n, D'] of the poolings without parameters
    tokens: Tensor | None = None  # [n, N, D], if they are kept

    def batch(self, positions: Tensor, device: torch.device) -> Encoded:
        tokens = None if self.tokens is None else self.tokens[positions].to(device, non_blocking=True)
        pooled = {label: vectors[positions].to(device, non_blocking=True) for label, vectors in self.pooled.items()}
        return Encoded(positions, self.images.targets[positions].to(device), tokens, None, pooled)


class Extractor:
    """Runs the encoder over images."""

    def __init__(
        self, encoder: FrozenEncoder, accelerator: Accelerator, batch_size: int, workers: int, progress: Progress
    ) -> None:
        self.encoder, self.accelerator, self.progress = encoder, accelerator, progress
        self.batch_size, self.workers = batch_size, workers
        self.seconds = 0.0
        self.encoded = 0
        self.left_out: dict[str, None] = {}  # in words, what could not be read

    def encode(self, images: Tensor, positions: Tensor, targets: Tensor, with_attention: bool) -> Encoded:
        began = time.perf_counter()
        images = images.to(self.accelerator.device, non_blocking=True)
        with self.accelerator.autocast():
            encoded = self.encoder(images, with_attention)
        self.encoded += len(images)
        self.seconds += time.perf_counter() - began
        return Encoded(positions, targets.to(images.device), encoded.tokens, encoded.cls_attention, {})

    def batches(self, images: EncoderImages, what: str, with_attention: bool) -> Iterator[Encoded]:
        """Every readable image once, in order; TrainingError if there is none."""
        loader = in_order(images, self.batch_size, self.workers, self.accelerator.device.type == "cuda")
        began = noted = time.perf_counter()
        done, read = 0, 0
        broken: list[tuple[int, str]] = []
        for batch in loader:
            broken += batch.broken
            done += len(batch.positions) + len(batch.broken)
            if batch.images is not None:
                read += len(batch.positions)
                targets = images.images.targets[batch.positions]
                yield self.encode(batch.images, batch.positions, targets, with_attention)
            now = time.perf_counter()
            if now - noted > _SECONDS_BETWEEN_NOTES:
                noted, rate = now, done / (now - began)
                left = duration((len(images) - done) / rate)
                self.progress.note(f"{what}  {done:,}/{len(images):,}  {count(rate)} images/s  {left} left")
        if broken:
            unread = images.images.unread(broken)
            if not read:
                raise TrainingError(unread)
            self.left_out[unread] = None
            warnings.warn(f"{unread}; they are left out", stacklevel=2)

    def features(self, images: EncoderImages, poolings: dict[str, Pooling], keep_tokens: bool, what: str) -> Features:
        """Pooled vectors of `poolings`, and the tokens if they are to be kept."""
        pooled: dict[str, list[Tensor]] = {label: [] for label in poolings}
        tokens: Tensor | None = None
        positions: list[Tensor] = []
        with_attention = any(pooling.needs_cls_attention for pooling in poolings.values())
        filled = 0
        for batch in self.batches(images, what, with_attention):
            positions.append(batch.positions)
            for label, pooling in poolings.items():
                with torch.no_grad():
                    pooled[label].append(pooling(batch.tokens, cls_attention=batch.cls_attention).cpu())
            if keep_tokens:
                assert batch.tokens is not None
                if tokens is None:  # at once, so that memory never holds it twice
                    tokens = torch.empty(len(images), *batch.tokens.shape[1:])
                tokens[filled : filled + len(batch.tokens)] = batch.tokens.cpu()
                filled += len(batch.tokens)
        readable_positions = torch.cat(positions)
        every = set(range(len(images)))
        broken = sorted(every - set(readable_positions.tolist()))
        readable = images.images.without(broken) if broken else images.images
        vectors = {label: torch.cat(parts) for label, parts in pooled.items()}
        return Features(readable, vectors, None if tokens is None else tokens[:filled])
