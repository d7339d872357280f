"""Which patches a run masks: by a strategy of ``mimkernels.data.masks``, drawn for every step anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.data.masks import MaskSampler

_DRAWS = 100  # of a batch until one masks something: ratios may be drawn, and be 0
_LATER = 2**40  # between the offsets of these draws; no run has as many steps


class Masking:
    """Draws the masks of a run, a function of its seed and the offset alone; ``random`` is left to the model.

    Args:
        config: ``masking``, ``masking_kwargs``, ``mask_ratio``, ``seed`` and the size of batches are read.
        grid: rows and columns of the model's patches.

    Raises:
        ValueError: the strategy refuses the grid or an option, or masks nothing of such a batch; or it leaves images
            different numbers of patches, of which heads have no statistics.
    """

    def __init__(self, config: PretrainConfig, grid: tuple[int, int]) -> None:
        self.seed, self.name, self.batch_size = config.seed, config.masking, config.batch_size
        self.options = given = config.masking_kwargs
        repeated = sorted({"grid", "strategy", "ratio", "stream", "backend"}.intersection(given))
        if repeated:
            raise ValueError(f"masking_kwargs takes options of the strategy, got {', '.join(repeated)}")
        #: None: the model draws.
        self.sampler = None
        self.share: float | None = None  # of patches, on average; None: the model's ratio
        if config.masking == "random" and not given:
            return
        self.sampler = MaskSampler(grid, config.masking, ratio=config.mask_ratio, **given)
        if self.sampler.needs_scores:
            raise ValueError(f"masking {config.masking!r} needs a teacher's attention, which a run does not have")
        if self.sampler.ragged and not config.the_method.sees_all and (config.head_stats or config.regularize):
            raise ValueError(
                f"masking {config.masking!r} leaves images different numbers of patches, for which head_stats and "
                f"regularize have no statistics: take one of equal counts, such as block_exact"
            )
        self._first(config.batch_size, 0)
        self.share = float(self.sampler.sample(1024, self.seed).mask.float().mean())

    def told(self) -> str:
        """The strategy in words, where there is one."""
        options = ", ".join(f"{name} {value}" for name, value in self.options.items())
        return f"{self.name}{f' ({options})' if options else ''}, {self.share:.0%} of the patches on average"

    def arguments(self, batch: int, offset: int) -> dict[str, Any]:
        """What a step calls the model with, in addition to its images; `seed` and `offset` if the model draws."""
        # A mask on the CPU is counted there: the model waits for no device.
        return {
            "seed": self.seed,
            **({"offset": offset} if self.sampler is None else {"mask": self._first(batch, offset)}),
        }

    def for_held_out(self, images: int) -> Tensor | None:
        """``[B, h, w]`` bool, images that are masked before others that are not; None if the model draws."""
        if self.sampler is None:
            return None
        mask = self._first(max(images, self.batch_size), 0)
        untouched = ~mask.flatten(1).any(1)
        return mask[untouched.to(torch.uint8).argsort(stable=True)[:images]]

    def _first(self, batch: int, offset: int) -> Tensor:
        """The first draw that masks something."""
        assert self.sampler is not None
        for draw in range(_DRAWS):
            mask = self.sampler.sample(batch, self.seed, offset + draw * _LATER, device="cpu").mask
            if mask.any():
                return mask
        raise ValueError(f"masking {self.name!r}: none of {_DRAWS} draws masks a patch of a batch of {batch}")
