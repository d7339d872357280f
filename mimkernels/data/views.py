"""Several augmented views of an image, as joint-embedding models are trained on: deterministic, uint8 throughout."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from mimkernels.data.batches import to_pixels

__all__ = ["AsymmetricViews", "ImageViews", "MultiCrop", "Strength", "view_steps"]

_JITTER = 0.4  # as published


class Strength(NamedTuple):
    """How strongly views are changed; None of what stays as published.

    Attributes:
        jitter: as of ``view_steps``, of every view.
        blur: probability, of every view.
        solarize: probability, of the second view; no other one is solarised.
    """

    jitter: float | None = None
    blur: float | None = None
    solarize: float | None = None

    def of_view(self, blur: float, solarize: float) -> dict[str, float]:
        """Arguments of ``view_steps`` for a view of these published probabilities."""
        return {
            "jitter": _JITTER if self.jitter is None else self.jitter,
            "blur": blur if self.blur is None else self.blur,
            "solarize": solarize if self.solarize is None or not solarize else self.solarize,
        }


_PUBLISHED = Strength()


def view_steps(
    size: int,
    in_chans: int,
    *,
    scale: tuple[float, float],
    hflip: bool,
    blur: float,
    solarize: float,
    jitter: float = _JITTER,
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
) -> v2.Compose:
    """BYOL's augmentations for one view: crop, colour, blur, solarisation, mirroring; uint8 in and out.

    Grey images change in brightness and contrast alone.

    Args:
        size: side of the view.
        in_chans: 3 (colour) or 1 (grey).
        scale: smallest and largest share of the image's area that is cropped.
        hflip: mirror half of the views.
        blur, solarize: probabilities. The kernel of the blur is a tenth of `size` wide, 23 pixels of 224, and at
            least 3; its deviation is drawn between 0.1 and 2 pixels.
        jitter: largest share by which brightness and contrast change; saturation by half of it, hue by a quarter.
    """
    colour = {"saturation": jitter / 2, "hue": jitter / 4} if in_chans == 3 else {}
    kernel = max(3, round(size / 10) // 2 * 2 + 1)
    steps: list[v2.Transform] = [
        v2.RandomResizedCrop(size, scale=scale, interpolation=interpolation, antialias=True),
        v2.RandomApply([v2.ColorJitter(brightness=jitter, contrast=jitter, **colour)], p=0.8),
        v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=blur),
    ]
    if in_chans == 3:
        steps.insert(2, v2.RandomGrayscale(p=0.2))
    if solarize:
        steps.append(v2.RandomSolarize(128, p=solarize))
    if hflip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)


class ImageViews:
    """Views of an image, each by steps of its own.

    Args:
        in_chans: 3 (colour) or 1 (grey).
        steps: from uint8 ``[C, H, W]`` to uint8 ``[C, S, S]``, one per view; they draw from torch's global generator.
    """

    def __init__(self, in_chans: int, steps: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> None:
        self.in_chans, self.steps = in_chans, tuple(steps)

    def __call__(self, image: Image.Image | torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
        """uint8 views, the same bits for the same seed; the global generator is left as it was."""
        pixels = to_pixels(image, self.in_chans)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: it would also reseed the accelerators of the training process.
            torch.default_generator.manual_seed(seed)
            return tuple(step(pixels).contiguous() for step in self.steps)


class AsymmetricViews(ImageViews):
    """The two views of MoCo v3: the first one always blurred, the second one rarely, but sometimes solarised.

    Args:
        img_size: side of both views.
        in_chans: 3 (colour) or 1 (grey).
        crop_scale: smallest share of the image's area that is cropped.
        hflip: mirror half of the views.
        strength: of what is not as published.

    Source: the augmentations of BYOL, arXiv:2006.07733, with the probabilities and the jitter of MoCo v3's code.
    """

    def __init__(
        self, img_size: int, in_chans: int, crop_scale: float, hflip: bool, strength: Strength = _PUBLISHED
    ) -> None:
        first, second = (
            view_steps(img_size, in_chans, scale=(crop_scale, 1.0), hflip=hflip, **strength.of_view(blur, solarize))
            for blur, solarize in ((1.0, 0.0), (0.1, 0.2))
        )
        super().__init__(in_chans, (first, second))


class MultiCrop(ImageViews):
    """The views of DINO: two global ones, augmented as MoCo v3's, then small local ones, half of them blurred.

    Args:
        img_size: side of the global views.
        in_chans: 3 (colour) or 1 (grey).
        crop_scale: smallest share of the image's area in a global view, largest in a local one.
        hflip: mirror half of the views.
        local_crops: number of local views.
        local_size: their side.
        local_scale: smallest share of the image's area in a local view.
        strength: of what is not as published.

    Source: arXiv:2104.14294 and its code.
    """

    def __init__(
        self,
        img_size: int,
        in_chans: int,
        crop_scale: float,
        hflip: bool,
        *,
        local_crops: int,
        local_size: int,
        local_scale: float,
        strength: Strength = _PUBLISHED,
    ) -> None:
        views = [
            (img_size, (crop_scale, 1.0), 1.0, 0.0),
            (img_size, (crop_scale, 1.0), 0.1, 0.2),
            *[(local_size, (local_scale, crop_scale), 0.5, 0.0)] * local_crops,
        ]
        steps = [
            view_steps(
                size,
                in_chans,
                scale=scale,
                hflip=hflip,
                **strength.of_view(blur, solarize),
                interpolation=InterpolationMode.BICUBIC,
            )
            for size, scale, blur, solarize in views
        ]
        super().__init__(in_chans, steps)
