"""Teachers of a run, and the one whose [cls] attention ``--masking attention_guided`` follows."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimkernels.commands.pretrain.config import EMA, PretrainConfig
from mimkernels.engine.encoder import FrozenEncoder, load_encoder
from mimkernels.engine.model_names import ModelChoice
from mimkernels.models.checkpoint import copy_by_name
from mimkernels.models.momentum import follow

__all__ = ["Autocast", "Teacher", "TeacherEncoder", "full_precision"]

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]

full_precision: Autocast = contextlib.nullcontext


class TeacherEncoder:
    """An encoder without gradients, the moving average of the trained one or a given one that stays as it is.

    Args:
        config: the model's name and the size of its images are read.
        model: what is trained, with an ``encoder`` of timm and the mean and deviation of its pixels.
        given: None takes the moving average, which begins as a copy.
        autocast: enters the precision of the run, which is the teacher's, too.
    """

    def __init__(
        self, config: PretrainConfig, model: Any, given: FrozenEncoder | None, autocast: Autocast = full_precision
    ) -> None:
        self._student = model.encoder if given is None else None
        self.autocast = autocast
        self.encoder = given or FrozenEncoder(
            copy.deepcopy(model.encoder),
            "moving average",
            f"the encoder {config.model}",
            img_size=config.img_size,
            in_chans=config.in_chans,
            mean=model.mean,
            std=model.std,
        )

    @property
    def moves(self) -> bool:
        """Whether the teacher changes while the model learns."""
        return self._student is not None

    @property
    def named(self) -> str:
        """The encoder in words."""
        return "the encoder's moving average" if self.moves else self.encoder.title

    @property
    def identity(self) -> str | None:
        """Of a teacher that stays as it is: changes with its weights."""
        return None if self.moves else self.encoder.fingerprint()

    def move(self, momentum: float) -> None:
        """Move by a step of the average, where the teacher is one."""
        if self._student is not None:
            self.encoder.to(next(self._student.parameters()).device)
            follow(self.encoder.model, self._student, momentum)

    def state(self) -> dict[str, Tensor] | None:
        """What a checkpoint keeps; None of a teacher that stays as it is."""
        return dict(self.encoder.model.state_dict()) if self.moves else None

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor] | None) -> None:
        """Continue from what a checkpoint keeps; where it has none, from what is trained."""
        if self._student is not None:
            given = self._student.state_dict() if state is None else state
            copy_by_name(self.encoder.model.state_dict(), given, title="the teacher")


class Teacher(TeacherEncoder):
    """The teacher of ``--masking attention_guided``.

    Args:
        config: ``teacher``, ``teacher_momentum`` and the size of the images are read.
        model: what is trained, with an ``encoder`` of timm and the mean and deviation of its pixels.
        autocast: enters the precision of the run.

    Raises:
        ValueError: there is no such teacher, it has no [cls] token, or it sees other patches; shows both sides.
    """

    def __init__(self, config: PretrainConfig, model: Any, autocast: Autocast = full_precision) -> None:
        self.momentum = config.teacher_momentum
        given = None
        if config.teacher != EMA:
            # A file knows the size of its images, a name of timm's takes any.
            size = None if Path(config.teacher).exists() else config.img_size
            given = load_encoder(ModelChoice(config.teacher, config.teacher, img_size=size))
        super().__init__(config, model, given, autocast)
        self._check(config, model.grid_size)

    def scores(self, images: Tensor) -> Tensor:
        """``[B, N]`` fp32: the last block's [cls] attention to the patches of uint8 `images`, mean over heads."""
        self.encoder.to(images.device)
        with self.autocast():
            attention = self.encoder(images, with_attention=True).cls_attention  # [B, H, P + N]
        assert attention is not None
        return attention[..., self.encoder.num_prefix :].float().mean(1)

    def follow(self) -> None:
        """To be called after each optimizer step."""
        self.move(self.momentum)

    def _check(self, config: PretrainConfig, grid: tuple[int, int]) -> None:
        encoder = self.encoder
        if not encoder.has_cls_token:
            raise ValueError(
                f"masking {config.masking!r} follows the attention of a [cls] token, which {encoder.title} has not"
            )
        encoder.check_attention(f"masking {config.masking!r}")
        for what, theirs, ours in (
            ("image sides", encoder.img_size, config.img_size),
            ("image channels", encoder.in_chans, config.in_chans),
            ("patches", encoder.grid, tuple(grid)),
        ):
            if theirs != ours:
                raise ValueError(f"teacher {config.teacher!r} has {what} {theirs}, the model {ours}; they must agree")
