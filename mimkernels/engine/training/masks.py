"""What the training loop needs of a run that masks patches, or whose model predicts what a teacher sees."""

from typing import Any, Protocol

from torch import Tensor

__all__ = ["Masks", "TeacherTargets"]


class Masks(Protocol):
    """Draws the masks of a run; ``mimkernels pretrain`` has one by its strategies.

    Attributes:
        name: of the strategy.
        sampler: None where the model draws.
        share: of patches that are masked, on average; None: the model's ratio.
        identity: of a teacher that stays as it is: changes with its weights; None without one.
    """

    name: str
    sampler: Any
    share: float | None

    @property
    def identity(self) -> str | None: ...

    def told(self) -> str:
        """The strategy in words, where there is one."""

    def arguments(self, images: Tensor, offset: int) -> dict[str, Any]:
        """What a step calls the model with, in addition to `images`."""

    def unguided(self, images: int, seed: int, offset: int) -> Tensor | None:
        """``[images, h, w]`` bool that no teacher has a say in; None if the model draws."""

    def follow(self) -> None:
        """To be called after each optimizer step."""

    def state(self) -> dict[str, Tensor] | None:
        """What a checkpoint keeps."""

    def load(self, state: dict[str, Tensor] | None) -> None:
        """Continue from what a checkpoint keeps, once the model has."""


class TeacherTargets(Protocol):
    """Makes the targets of a run of its images; ``mimkernels pretrain`` has features of a teacher.

    Attributes:
        told: the target in words.
        moves: whether a teacher changes while the model learns.
        stages: in how many equal stages the model is trained, each from new weights on; 1 of most targets.
        identities: of those that do not, each by what it teaches: change with the weights.
    """

    @property
    def told(self) -> str: ...

    @property
    def moves(self) -> bool: ...

    @property
    def stages(self) -> int: ...

    @property
    def identities(self) -> dict[str, str]: ...

    def arguments(self, images: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """What a step calls the model with, in addition to `images` and to what masks them."""

    def begin_stage(self, number: int) -> str:
        """To be called before the first step of every stage but the first, which is number 0; tells what it did."""

    def follow(self, share: float) -> None:
        """To be called after each optimizer step, after `share` of the training."""

    def state(self) -> dict[str, Tensor] | None:
        """What a checkpoint keeps; None of a teacher that stays as it is."""

    def load(self, state: dict[str, Tensor] | None) -> None:
        """Continue from what a checkpoint keeps."""
