"""What a method that ``mimkernels pretrain`` trains by has to say of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from mimkernels.data.batches import Augmentation, Pixels, Views
    from mimkernels.engine.training.validation import Means

__all__ = ["MASK_OPTIONS", "VIEW_OPTIONS", "Method", "Moment"]

# Options of methods that mask patches.
MASK_OPTIONS = ("masking", "mask_ratio", "masking_kwargs")
# Options of methods that compare views: how strongly these are changed.
VIEW_OPTIONS = ("color_jitter", "blur_prob", "solarize_prob")


class Moment(NamedTuple):
    """Where in a run an optimizer step is; the first step is number 0."""

    step: int
    total_steps: int
    steps_per_epoch: int

    @property
    def share(self) -> float:
        """Of the run that lies behind, in [0, 1)."""
        return self.step / self.total_steps

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch


class Method:
    """One method; no instances: a run's state lies in its model. How that is built is in ``mimkernels.models.build``.

    A model is called with images and with what ``call`` and, of a method that masks, ``Masking`` give; the result has
    ``loss``, a scalar; ``head_stats`` where the call asked for them; and perhaps ``metrics``, detached scalars by
    name, which are averaged over the steps of a log entry and over the processes.

    A training step calls, in this order: ``schedule``, ``before_step``, the model, ``before_update`` when gradients
    are complete and clipped, the optimizer, ``after_step``. The hooks take the model without wrappers; its
    parameters may be sharded.

    Settings are those of the command, a ``TrainingConfig``.

    Attributes:
        title: the method's name for people.
        options: settings that other methods have no use for.
        masks: whether patches are masked.
        reconstructs: whether the model has ``reconstruct``, which gives pictures.
        labelled: whether images are read with their class numbers.
        mask_ratio, beta2, blr, weight_decay, clip_grad, warmup_share: where the settings name none; the last is the
            share of the epochs in which the learning rate rises.
        momentum: the same, of methods whose targets come from a moving average.
        crop_scale: the same; None takes that of the data.
        clips_each: the gradient norm that is clipped is that of each parameter, not of all together.
        target_moves: what is predicted changes while the model learns, so that losses of two steps do not compare.
        blind: what the best answer is that looks at no image, whose loss ``blind_loss`` gives.
        ops: whose backends the report names.
        exported: file of the weights under their published names.
        best: metric of the validation whose best weights are kept, too, in ``BEST``; None: of none.
        sees_all: whether the encoder has a token for every patch, masked or not.
    """

    title: ClassVar[str]
    options: ClassVar[tuple[str, ...]]
    masks: ClassVar[bool] = True
    reconstructs: ClassVar[bool] = True
    labelled: ClassVar[bool] = False
    mask_ratio: ClassVar[float | None] = None
    beta2: ClassVar[float] = 0.999
    blr: ClassVar[float] = 1.5e-4
    weight_decay: ClassVar[float] = 0.05
    clip_grad: ClassVar[float | None] = None
    warmup_share: ClassVar[float] = 0.05  # as MAE: 40 of 800
    momentum: ClassVar[float | None] = None
    crop_scale: ClassVar[float | None] = None
    clips_each: ClassVar[bool] = False
    target_moves: ClassVar[bool] = False
    blind: ClassVar[str] = ""
    ops: ClassVar[tuple[str, ...]]
    exported: ClassVar[str]
    best: ClassVar[str | None] = None
    sees_all: ClassVar[bool]

    @classmethod
    def check(cls, config: Any) -> None:
        """Raise ValueError for settings that cannot work together with this method."""

    @classmethod
    def paints(cls, config: Any) -> bool:
        """Whether the model gives pictures with these settings."""
        return cls.reconstructs

    @staticmethod
    def views(config: Any, augmentation: Augmentation) -> Views:
        """What is made of an image: one view by default, by the settings' crop and flip; see ``Views``."""
        return augmentation

    @classmethod
    def call(
        cls, config: Any, images: Pixels, targets: Tensor | None, *, seed: int, training: bool
    ) -> tuple[Any, dict[str, Any]]:
        """What the model is called with for a batch on its device: the images and further arguments by name.

        `seed` is the batch's own; a run that is continued gives the same again.
        """
        return images, {} if targets is None else {"targets": targets}

    @staticmethod
    def draw_masks(model: Any, images: int, seed: int, offset: int) -> Tensor:
        """``[images, h, w]`` bool as the model draws them; the mask of an image depends on its number alone."""
        raise NotImplementedError

    @staticmethod
    def blind_loss(model: Any, images: Pixels, arguments: Mapping[str, Any], means: Means) -> Tensor | None:
        """The loss of the best answer that looks at no image, for a call of the model; None if there is none."""
        return None

    @classmethod
    def schedule(cls, config: Any, at: Moment) -> dict[str, float]:
        """Values by name that change with the steps, besides the learning rate; they are logged.

        ``weight_decay`` is that of the parameters that are decayed. Others are for the hooks.
        """
        return {}

    @staticmethod
    def before_step(model: Any, scheduled: Mapping[str, float], at: Moment) -> None:
        """Prepare the model for the forward passes of a step."""

    @staticmethod
    def before_update(model: Any, scheduled: Mapping[str, float], at: Moment) -> None:
        """Change gradients before the optimizer takes its step."""

    @staticmethod
    def after_step(model: Any, scheduled: Mapping[str, float], at: Moment) -> None:
        """Follow the optimizer's step, as the weights of a teacher do."""

    @staticmethod
    def undecayed(config: Any, name: str) -> bool:
        """Whether no weight decay acts on a parameter, by its name, though its shape does not say so."""
        return False

    @staticmethod
    def blocks(model: Any) -> list[Any]:
        """Transformer blocks, the parts by which FSDP2 shards."""
        raise NotImplementedError

    @staticmethod
    def weights(model: Any) -> Mapping[str, Any]:
        """Weights under their published names."""
        raise NotImplementedError

    @classmethod
    def content(cls, model: Any) -> dict[str, Any]:
        """What the file of the weights holds."""
        return {"model": cls.weights(model)}

    @staticmethod
    def masked_share(model: Any) -> float:
        """Share of the patches that are masked."""
        share: float = model.mask_ratio
        return share

    @staticmethod
    def lead(config: Any, masked_share: float | None) -> str:
        """What the model learns, in one or two sentences; None of a method that masks nothing."""
        raise NotImplementedError

    @staticmethod
    def loss_words(config: Any) -> str:
        """What the loss is, as the beginning of a sentence without its end."""
        raise NotImplementedError

    @staticmethod
    def verdict(config: Any, untrained: Mapping[str, float], now: Mapping[str, float]) -> str:
        """What loss and metrics on new images say, of the model before its first step and of the trained one."""
        return ""

    @staticmethod
    def picture_words(config: Any) -> str:
        """What is to be known of reconstructed pixels; may be empty."""
        return ""
