"""What every model of this package shares: images in, pixels normalised as the encoder wants them."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Self

import torch
from torch import Tensor, nn

from mimkernels.models.architecture import check_architecture, check_sizes
from mimkernels.nn.attention import attention_layers
from mimkernels.nn.recorder import LayerRecorder

__all__ = ["COMPUTED_BY", "WEIGHT_KWARGS", "ImageModel", "check_computed_by", "check_integers", "check_numbers"]

COMPUTED_BY = ("mimkernels", "timm")

# Arguments of timm.create_model that say where weights come from: no part of the architecture.
WEIGHT_KWARGS = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


class ImageModel(nn.Module):
    """Base of the models: a timm encoder that is trained on images, and what is known of their pixels.

    A subclass has ``from_timm(name, ...)`` and calls ``_set_encoder`` and ``_set_pixel_statistics``.
    """

    encoder: Any  # of timm; its attributes depend on the family
    _family: Any = None  # of ``masked_encoders``, where the model takes several
    patch_size: tuple[int, int]
    grid_size: tuple[int, int]
    in_chans: int
    _pixel_mean: Tensor | None
    _pixel_std: Tensor | None
    config: dict[str, Any] | None = None  #: arguments of `from_timm` that rebuild this model

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A new model with the arguments of another: ``Model.from_config(model.config)``; weights are fresh.

        `config` may come from a file that nobody vouches for: unlike ``from_timm``, this opens nothing.

        Raises:
            ValueError: as ``from_timm``; or the name has another source than timm, or a timm argument is not one of
                the architecture (checkpoint_path, pretrained_cfg and the like), or no plain value.
        """
        from_timm: Any = cls.from_timm  # type: ignore[attr-defined] # each subclass has its own arguments
        own = inspect.getfullargspec(from_timm)
        for_timm = ("img_size", "in_chans", "patch_size", *(config.keys() - {*own.args, *own.kwonlyargs}))
        name: Any = config.get("name")
        check_architecture(name, {key: config[key] for key in for_timm if key in config})
        check_sizes(config)
        model: Self = from_timm(**config)
        return model

    @classmethod
    def _initialised(
        cls,
        encoder: nn.Module,
        init: Callable[[Any], None],
        name: str,
        shape: dict[str, Any],
        own: dict[str, Any],
        timm_kwargs: dict[str, Any],
    ) -> Self:
        """What ``from_timm`` returns: around `encoder`, which `init` fills unless timm gave it weights.

        Args:
            name, shape, own, timm_kwargs: the arguments of ``from_timm``; `own` are those of the class, too.
        """
        weights = {key: timm_kwargs[key] for key in WEIGHT_KWARGS if key in timm_kwargs}
        if not (weights.get("pretrained") or weights.get("checkpoint_path")):
            init(encoder)
        for key in ("mean", "std"):
            own[key] = None if own[key] is None else [float(value) for value in own[key]]
        build: Any = cls  # each subclass has its own arguments
        model: Self = build(encoder, **own)
        architecture = {key: value for key, value in timm_kwargs.items() if key not in WEIGHT_KWARGS}
        model.config = {"name": name, **shape, **own, **architecture}
        return model

    @property
    def dynamic_img_size(self) -> bool:
        """Whether images of any size that the patches divide are taken."""
        return (self._family is None or self._family.resizes) and bool(self.encoder.dynamic_img_size)

    @property
    def evaluated_encoder(self) -> nn.Module:
        """The encoder that features are read from when training is over."""
        encoder: nn.Module = self.encoder
        return encoder

    def blank(self, batch: int) -> Tensor:
        """Images for functions that look at their shape alone; they share the memory of one pixel."""
        size = self.encoder.patch_embed.img_size
        device = self.encoder.patch_embed.proj.weight.device
        return torch.zeros(1, 1, 1, 1, device=device).expand(batch, self.in_chans, *size)

    def _constant(self, colour: Tensor | None, images: Tensor, tokens: int, size: tuple[int, int]) -> Tensor:
        """``[B, N, E]``: pixels of one normalised colour, or 0, predicted for `tokens` of `size` pixels."""
        pixels = torch.zeros(self.in_chans, device=images.device)
        if colour is not None:
            pixels = colour.to(images.device)
            if self._pixel_mean is not None and self._pixel_std is not None:
                pixels = (pixels - self._pixel_mean) / self._pixel_std
        return pixels.repeat(size[0] * size[1]).expand(images.shape[0], tokens, -1).contiguous()

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return images.shape[-2] // self.patch_size[0], images.shape[-1] // self.patch_size[1]

    def _check_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
        size = tuple(self.encoder.patch_embed.img_size)
        wanted = f"[B, {self.in_chans}, {size[0]}, {size[1]}]"
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"the model takes images {wanted}, got {list(images.shape)}")
        if self.dynamic_img_size:
            if images.shape[2] % self.patch_size[0] or images.shape[3] % self.patch_size[1]:
                raise ValueError(
                    f"patch size {self.patch_size[0]} x {self.patch_size[1]} does not divide images "
                    f"{list(images.shape)}"
                )
        elif tuple(images.shape[2:]) != size:
            raise ValueError(
                f"the model takes images {wanted}, got {list(images.shape)}; resize them, or build the model "
                "with that img_size or dynamic_img_size=True"
            )
        if images.dtype == torch.uint8 and self.mean is None:
            raise ValueError("uint8 images need the model's mean and std, which are None; give them when building it")
        device = self.encoder.patch_embed.proj.weight.device
        if images.device != device:
            raise ValueError(f"images are on {images.device} but the model is on {device}")

    @contextlib.contextmanager
    def _recorded(self, images: Tensor, head_stats: Sequence[str]) -> Iterator[Any]:
        """The encoder's heads over all patches of `images`, layer by layer, or None where no statistic is wanted."""
        if not head_stats:
            yield None
            return
        layers = attention_layers(self.encoder)
        positions = self._family.positions(self.encoder, layers, self._grid(images), images.device)
        prefix = getattr(self.encoder, "num_prefix_tokens", 0)
        with LayerRecorder(layers, head_stats, num_prefix=prefix, positions=positions) as heads:
            yield heads

    def _check_mask(self, mask: Tensor, images: Tensor) -> None:
        wanted = [images.shape[0], *self._grid(images)]
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor {wanted}, True = masked, got {given}")
        if list(mask.shape) != wanted:
            raise ValueError(f"mask must be {wanted}, one value per image and patch, got {list(mask.shape)}")

    @contextlib.contextmanager
    def _in_eval_mode(self) -> Iterator[None]:
        training = [part for part in self.modules() if part.training]
        self.eval()
        try:
            yield
        finally:
            for part in training:
                part.training = True

    def _set_encoder(self, encoder: Any) -> None:
        """Keep `encoder`, and what its patch embedding says of images."""
        embed = encoder.patch_embed
        self.encoder = encoder
        self.patch_size, self.grid_size = tuple(embed.patch_size), tuple(embed.grid_size)
        self.in_chans = embed.proj.in_channels

    def _title(self) -> str:
        """The encoder of a family in words, for whoever is told that weights do not fit it."""
        blocks = len(list(self._family.blocks(self.encoder)))
        return (
            f"{(self.config or {}).get('name', type(self.encoder).__name__)}, {self.encoder.num_features} wide, "
            f"{blocks} blocks, {self.grid_size[0]} x {self.grid_size[1]} patches"
        )

    def _set_pixel_statistics(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        if (mean is None) != (std is None):
            raise ValueError(f"give mean and std together or neither, got mean={mean}, std={std}")
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != self.in_chans:
                raise ValueError(f"{name} has {len(values)} values but images have {self.in_chans} channels")
        if std is not None and not all(value > 0 for value in std):
            raise ValueError(f"std must be positive, got {std}")
        self.mean = None if mean is None else tuple(float(value) for value in mean)
        self.std = None if std is None else tuple(float(value) for value in std)
        # Buffers, so that no step copies them to the device; not saved: they are arguments, not weights.
        self.register_buffer("_pixel_mean", None if mean is None else torch.tensor(self.mean), persistent=False)
        self.register_buffer("_pixel_std", None if std is None else torch.tensor(self.std), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._pixel_mean is not None:
            # A model in half precision still normalises with exact statistics; to_empty() leaves them filled.
            device = self._pixel_mean.device
            self._pixel_mean = torch.tensor(self.mean, dtype=torch.float32, device=device)
            self._pixel_std = torch.tensor(self.std, dtype=torch.float32, device=device)
        return self


def check_computed_by(**choices: str) -> None:
    """Raise ValueError, naming the argument, unless each choice is one of ``COMPUTED_BY``."""
    for name, value in choices.items():
        if value not in COMPUTED_BY:
            raise ValueError(f"{name} must be one of {', '.join(COMPUTED_BY)}, got {value!r}")


def check_numbers(**given: object) -> None:
    """Refuse what is no number, by name."""
    _check_kind(Real, "a number", given)


def check_integers(**given: object) -> None:
    """Refuse what is no integer, by name."""
    _check_kind(Integral, "an integer", given)


def _check_kind(kind: type, wanted: str, given: Mapping[str, object]) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, kind):
            raise TypeError(f"{name} must be {wanted}, got {type(value).__name__} {value!r:.60}")
