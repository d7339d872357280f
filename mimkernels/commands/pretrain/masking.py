"""Which patches a run masks: by a strategy of ``mimkernels.data.masks``, drawn or followed for every step anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.teacher import Autocast, Teacher, full_precision
from mimkernels.data.masks import MaskSampler
from mimkernels.engine.command import TrainingError

_DRAWS = 100  # of a batch until one masks something: ratios may be drawn, and be 0
_LATER = 2**40  # between the offsets of these draws; no run has as many steps


class Masking:
    """Draws the masks of a run, a function of its seed and the offset alone; ``random`` is left to the model.

    Those of ``attention_guided`` are a function of the images and of the teacher.

    Args:
        config: ``masking``, ``masking_kwargs``, ``mask_ratio``, ``teacher``, ``seed`` and the size of batches are read.
        model: what is trained.
        autocast: enters the precision of the run, for a teacher.

    Raises:
        ValueError: the strategy refuses the grid or an option, or masks nothing of such a batch; or it leaves images
            different numbers of patches, of which heads have no statistics; or the teacher does not fit.
    """

    def __init__(self, config: PretrainConfig, model: Any, autocast: Autocast = full_precision) -> None:
        grid: tuple[int, int] = model.grid_size
        self.seed, self.name, self.batch_size = config.seed, config.masking, config.batch_size
        self.options = given = config.masking_kwargs
        repeated = sorted({"grid", "strategy", "ratio", "stream", "backend"}.intersection(given))
        if repeated:
            raise ValueError(f"masking_kwargs takes options of the strategy, got {', '.join(repeated)}")
        #: None: the model draws.
        self.sampler = None
        self.share: float | None = None  # of patches, on average; None: the model's ratio
        self.teacher: Teacher | None = None
        if config.masking == "random" and not given:
            return
        self.sampler = MaskSampler(grid, config.masking, ratio=config.mask_ratio, **given)
        if self.sampler.ragged and not config.the_method.sees_all and (config.head_stats or config.regularize):
            raise ValueError(
                f"masking {config.masking!r} leaves images different numbers of patches, for which head_stats and "
                f"regularize have no statistics: take one of equal counts, such as block_exact"
            )
        if self.sampler.needs_scores:
            self.teacher = Teacher(config, model, autocast)
            one = self.sampler.sample(1, self.seed, scores=torch.zeros(1, grid[0] * grid[1]))
            self.share = float(one.mask.float().mean())
            return
        self._first(config.batch_size, 0)
        self.share = float(self.sampler.sample(1024, self.seed).mask.float().mean())

    def told(self) -> str:
        """The strategy in words, where there is one."""
        options = ", ".join(f"{name} {value}" for name, value in self.options.items())
        teacher = f", by the [cls] attention of {self.teacher.named}" if self.teacher is not None else ""
        return f"{self.name}{f' ({options})' if options else ''}, {self.share:.0%} of the patches on average{teacher}"

    def arguments(self, images: Tensor, offset: int) -> dict[str, Any]:
        """What a step calls the model with, in addition to `images`; `seed` and `offset` if the model draws."""
        if self.sampler is None:
            return {"seed": self.seed, "offset": offset}
        # A mask on the CPU is counted there: the model waits for no device.
        mask = self._first(len(images), offset) if self.teacher is None else self._guided(images)
        return {"seed": self.seed, "mask": mask}

    def unguided(self, images: int, seed: int, offset: int) -> Tensor | None:
        """``[images, h, w]`` bool that no teacher has a say in, as many at random; None if the model draws."""
        if self.sampler is None:
            return None
        sampler = self.sampler
        if self.teacher is not None:
            sampler = MaskSampler(sampler.grid, "random", ratio=self.share)
        return sampler.sample(images, seed, offset, device="cpu").mask

    @property
    def identity(self) -> str | None:
        """Of a teacher that stays as it is: changes with its weights; None of others."""
        return None if self.teacher is None else self.teacher.identity

    def follow(self) -> None:
        """To be called after each optimizer step."""
        if self.teacher is not None:
            self.teacher.follow()

    def state(self) -> dict[str, Tensor] | None:
        """What a checkpoint keeps."""
        return None if self.teacher is None else self.teacher.state()

    def load(self, state: dict[str, Tensor] | None) -> None:
        """Continue from what a checkpoint keeps, once the model has."""
        if self.teacher is not None:
            self.teacher.load(state)

    def for_held_out(self, images: Tensor) -> Tensor | None:
        """``[B, h, w]`` bool, images that are masked before others that are not; None if the model draws."""
        if self.sampler is None:
            return None
        if self.teacher is not None:
            return torch.cat([self._guided(part) for part in images.split(self.batch_size)])
        mask = self._first(max(len(images), self.batch_size), 0)
        untouched = ~mask.flatten(1).any(1)
        return mask[untouched.to(torch.uint8).argsort(stable=True)[: len(images)]]

    def _guided(self, images: Tensor) -> Tensor:
        assert self.sampler is not None and self.teacher is not None
        scores = self.teacher.scores(images)
        try:
            return self.sampler.sample(len(images), self.seed, device=images.device, scores=scores).mask
        except ValueError as e:  # NaN, which its weights or the precision of the run make
            raise TrainingError(f"{e}: the attention of {self.teacher.named}") from e

    def _first(self, batch: int, offset: int) -> Tensor:
        """The first draw that masks something."""
        assert self.sampler is not None
        for draw in range(_DRAWS):
            mask = self.sampler.sample(batch, self.seed, offset + draw * _LATER, device="cpu").mask
            if mask.any():
                return mask
        raise ValueError(f"masking {self.name!r}: none of {_DRAWS} draws masks a patch of a batch of {batch}")
