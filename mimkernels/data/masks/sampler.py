"""One interface to every masking strategy."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimkernels.data.masks import native, reference
from mimkernels.data.masks.batch import MaskBatch
from mimkernels.data.masks.blocks import IBOT, Block, BlockExact, DINOv2, InverseBlock
from mimkernels.data.masks.multiblock import Multiblock, Multiblock3d
from mimkernels.data.masks.regular import AttentionGuided, Random, Tube, Uniform, Unit
from mimkernels.data.masks.strategy import Draw, Strategy, Wanted, by, is_count
from mimkernels.ops import _checks
from mimkernels.ops._registry import BACKENDS

#: The strategies by name.
STRATEGIES: dict[str, type[Strategy]] = {
    "random": Random,
    "unit": Unit,
    "block": Block,
    "block_exact": BlockExact,
    "inverse_block": InverseBlock,
    "dinov2": DINOv2,
    "ibot": IBOT,
    "multiblock": Multiblock,
    "multiblock3d": Multiblock3d,
    "tube": Tube,
    "uniform": Uniform,
    "attention_guided": AttentionGuided,
}
_STREAM_STEP = 0x9E3779B97F4A7C15  # between the seeds of neighbouring streams
_LONGEST_SIDE = 2**15


class MaskSampler:
    """Draws which patches are masked.

    What is drawn is a function of the seed, the offset (a training step, or an epoch) and the sample's number alone:
    the same masks whichever process, and however many, draw them, on every device. Block types are drawn on the CPU by
    the module of ``csrc/masks`` without the GIL, or in Python where that is not there; others where they are wanted.

    Args:
        grid: patches of an image, (height, width), or of a video, (frames, height, width).
        strategy: a name in ``STRATEGIES``; the class of that name describes it and its options.
        ratio: share of masked patches; None: the strategy's own, or `count`.
        count: how many patches to mask, in place of `ratio`.
        stream: samplers of one image (views, groups of blocks) draw independently under different numbers.
        backend: ``"auto"``; of block types ``"cpu"`` (the module) or ``"reference"`` (Python), of others one of
            ``random_mask``. A named backend never falls back.
        options: of the strategy.

    Raises:
        ValueError: an unknown strategy or option, a ratio that masks all or nothing, a grid that is too small for the
            strategy; shows both sides.

    Example::

        sampler = MaskSampler((14, 14), "block_exact", count=75)
        masks = sampler.sample(64, seed=0, offset=7)           # in the training loop: 7 is the step
        masks = sampler.sample([17, 3, 250], seed=0, offset=1)  # in a worker: of these samples, in epoch 1
    """

    def __init__(
        self,
        grid: Sequence[int],
        strategy: str = "random",
        *,
        ratio: float | None = None,
        count: int | None = None,
        stream: int = 0,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        kind = STRATEGIES.get(strategy) if isinstance(strategy, str) else None
        if kind is None:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
        if not isinstance(grid, Sequence) or not all(is_count(side) and 1 <= side <= _LONGEST_SIDE for side in grid):
            raise ValueError(f"grid must be sides from 1 to {_LONGEST_SIDE} patches, got {grid!r}")
        if len(grid) != kind.dims:
            wanted = "(height, width)" if kind.dims == 2 else "(frames, height, width)"
            raise ValueError(f"{strategy} takes a grid of {wanted}, got {tuple(grid)}")
        known = inspect.signature(kind.__init__).parameters
        names = [name for name, parameter in known.items() if parameter.kind is parameter.KEYWORD_ONLY]
        unknown = sorted(options.keys() - set(names))
        if unknown:
            raise ValueError(
                f"{strategy} has no option {', '.join(unknown)}; its options: {', '.join(names) or 'none'}"
            )
        if not is_count(stream) or stream < 0:
            raise ValueError(f"stream must be 0 or more, got {stream!r}")
        self.grid, self.strategy = tuple(int(side) for side in grid), strategy
        self._strategy = kind(Wanted(strategy, self.grid, ratio, count), **options)
        self._stream = int(stream)
        self._backend = backend
        if not kind.on_device:
            _module(strategy, backend)
        elif not isinstance(backend, str) or backend not in ("auto", *BACKENDS):
            raise ValueError(f"{strategy}: backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
        given = {"ratio": ratio, "count": count, **options}
        self._given = {name: value for name, value in given.items() if value is not None}

    def __repr__(self) -> str:
        stream = {"stream": self._stream} if self._stream else {}
        options = "".join(f", {name}={value!r}" for name, value in {**self._given, **stream}.items())
        return f"MaskSampler({self.grid}, {self.strategy!r}{options})"

    @classmethod
    def for_images(
        cls,
        img_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        strategy: str = "random",
        *,
        mask_unit: int | None = None,
        **arguments: Any,
    ) -> MaskSampler:
        """A sampler for images of `img_size` pixels in patches of `patch_size`; one number, or (height, width).

        Args:
            mask_unit: pixels per side of the unit of ``unit`` (SimMIM: 32), a multiple of the patch that divides the
                image.
            arguments: those of the class.
        """
        image, patch = _pair("img_size", img_size), _pair("patch_size", patch_size)
        if any(side % p for side, p in zip(image, patch, strict=True)):
            raise ValueError(f"patch_size {by(patch)} does not divide img_size {by(image)}")
        if mask_unit is not None:
            if strategy != "unit":
                raise ValueError(f"mask_unit {mask_unit} belongs to strategy 'unit', not to {strategy!r}")
            unit = _pair("mask_unit", mask_unit)[0]
            if patch[0] != patch[1] or unit % patch[0]:
                raise ValueError(f"mask_unit {unit} is no multiple of patch_size {by(patch)}")
            if any(side % unit for side in image):
                raise ValueError(f"mask_unit {unit} does not divide img_size {by(image)}")
            arguments["unit"] = unit // patch[0]
        return cls([side // p for side, p in zip(image, patch, strict=True)], strategy, **arguments)

    @property
    def needs_scores(self) -> bool:
        """Whether ``sample`` needs ``scores``."""
        return self._strategy.needs_scores

    @property
    def ragged(self) -> bool:
        """Whether images of a batch may have different numbers of masked patches."""
        return self._strategy.ragged

    def sample(
        self,
        batch: int | Sequence[int] | np.ndarray,
        seed: int,
        offset: int | Tensor = 0,
        *,
        device: torch.device | str | None = None,
        scores: Tensor | None = None,
    ) -> MaskBatch:
        """The masks of a batch.

        Args:
            batch: B, whose samples are numbered 0 .. B - 1 (the offset then is the step); or the samples' numbers in
                the data set, each in ``[0, 2^32)`` (the offset then is the epoch). What the images of a batch share
                (``dinov2``, ``multiblock``, ``multiblock3d``) is drawn by its first number.
            seed: in ``[0, 2^63)``.
            offset: in ``[0, 2^63)``; for strategies drawn on the device with B also a 0-d int64 tensor there, as in
                ``random_mask``.
            device: where the masks are wanted; None: the CPU for block types, torch's default device for others.
            scores: ``[B, N]`` floating point, for ``attention_guided``. NaN on CUDA counts as the highest score, as
                looking would make the host wait; ``MIMKERNELS_DEBUG=1`` looks.

        Raises:
            ValueError: a number is out of range, scores do not fit, or are NaN; shows both sides.
        """
        kind = self._strategy
        samples, numbered = _samples(batch)
        step = None
        if isinstance(offset, Tensor):
            if numbered or not kind.on_device:
                raise ValueError(
                    f"{self.strategy}: an offset tensor goes with strategies on the device and a batch size"
                )
            step, offset = offset, 0
        for name, value in (("seed", seed), ("offset", offset)):
            if not is_count(value) or not 0 <= value < 2**63:
                raise ValueError(f"{self.strategy}: {name} must be an integer in [0, 2^63), got {value!r}")
        self._check_scores(scores, len(samples))
        wanted = None if device is None else torch.device(device)
        if wanted is None and step is not None:
            wanted = step.device
        seed = (int(seed) + self._stream * _STREAM_STEP) % 2**63
        module = None if kind.on_device else _module(self.strategy, self._backend)
        drawn = kind.draw(Draw(samples, numbered, seed, int(offset), step, wanted, self._backend, module, scores))
        return drawn if wanted is None or kind.on_device else drawn.to(wanted)

    def _check_scores(self, scores: Tensor | None, batch: int) -> None:
        if self.needs_scores:
            wanted = [batch, self._strategy.tokens]
            if not isinstance(scores, Tensor) or list(scores.shape) != wanted:
                got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise ValueError(f"{self.strategy} needs scores {wanted}, one per patch, got {got}")
            if _checks.values_at_hand(scores) and (wrong := scores.isnan().any(1)).any():
                raise ValueError(
                    f"{self.strategy} needs scores that are numbers, got NaN for {int(wrong.sum())} of {batch} images, "
                    f"the first at {int(wrong.nonzero()[0])}"
                )
        elif scores is not None:
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"{self.strategy} takes no scores, got {got}")


def _module(strategy: str, backend: str) -> Any:
    if not isinstance(backend, str) or backend not in ("auto", "cpu", "reference"):
        raise ValueError(f"{strategy}: backend must be auto, cpu or reference, got {backend!r}")
    module = None if backend == "reference" else native.module()
    if module is None and backend == "cpu":
        state = native.state()
        raise NotImplementedError(f"{strategy}: no native mask samplers: {state.reason}; {state.remedy}")
    return module or reference


def _samples(batch: Any) -> tuple[np.ndarray, bool]:
    if is_count(batch):
        if not 0 <= batch < 2**32:
            raise ValueError(f"batch must be a number of images in [0, 2^32), got {batch}")
        return np.arange(int(batch), dtype=np.uint32), False
    numbers = np.asarray(batch)
    if numbers.ndim != 1 or not (np.issubdtype(numbers.dtype, np.integer) or numbers.size == 0):
        raise ValueError(f"batch must be a number of images or a list of sample numbers, got {batch!r}")
    if numbers.size and not (0 <= numbers.min() and numbers.max() < 2**32):
        raise ValueError(f"sample numbers must lie in [0, 2^32), got {numbers.min()} to {numbers.max()}")
    return numbers.astype(np.uint32), True


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(is_count(side) and side > 0 for side in pair):
        raise ValueError(f"{name} must be a positive integer or (height, width), got {value!r}")
    return pair
