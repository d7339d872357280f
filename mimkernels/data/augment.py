"""Augmentation for fine-tuning: crop, mirroring and RandAugment, and tests on the centre of an image."""

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from mimkernels.data.batches import Augmentation, drawing_from, to_pixels

__all__ = ["FinetuneAugmentation"]


class FinetuneAugmentation(Augmentation):
    """``Augmentation`` with RandAugment behind it, by timm; deterministic, uint8 throughout.

    Args:
        img_size, in_chans, crop_scale, hflip: as of ``Augmentation``.
        auto_augment: RandAugment, AugMix or AutoAugment as timm names it, such as ``rand-m9-mstd0.5-inc1``, or "none".
        mean: of the pixels in [0, 1]: what comes in at the border of a moved image is filled with it.
        test_crop: share of the central square's side that ``plain`` keeps; published: 224/256.

    Raises:
        ValueError: timm has no such augmentation.
    """

    def __init__(
        self,
        img_size: int,
        in_chans: int,
        crop_scale: float,
        hflip: bool,
        *,
        auto_augment: str,
        mean: tuple[float, ...],
        test_crop: float,
    ) -> None:
        super().__init__(img_size, in_chans, crop_scale, hflip)
        self.test_crop = test_crop
        self._augment: v2.Transform | None = None
        if auto_augment != "none":
            from timm.data import create_transform

            try:
                steps = create_transform(
                    img_size, is_training=True, hflip=0.0, color_jitter=0.0, auto_augment=auto_augment,
                    interpolation="bicubic", mean=mean if len(mean) == 3 else mean * 3, separate=True,
                )  # fmt: skip
            except (AssertionError, ValueError, KeyError) as e:
                raise ValueError(
                    f"auto_augment must be none or an augmentation of timm such as rand-m9-mstd0.5-inc1, got "
                    f"{auto_augment!r}: {e}"
                ) from None
            self._augment = steps[1]

    def __call__(self, image: Image.Image | torch.Tensor, seed: int) -> torch.Tensor:
        """uint8 ``[C, S, S]``, the same bits for the same seed; the global generators are left as they were."""
        pixels = super().__call__(image, seed)
        if self._augment is None:
            return pixels
        picture = v2.functional.to_pil_image(pixels.expand(3, -1, -1))
        with drawing_from(seed):
            picture = self._augment(picture)
        return to_pixels(picture, self.in_chans).contiguous()

    def plain(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        """The central square, or ``test_crop`` of it, resized."""
        if self.test_crop == 1:
            return super().plain(image)
        pixels = to_pixels(image, self.in_chans)
        side = max(1, round(self.test_crop * min(pixels.shape[-2:])))
        pixels = v2.functional.center_crop_image(pixels, [side, side])
        size = [self.img_size, self.img_size]
        return v2.functional.resize_image(pixels, size, InterpolationMode.BICUBIC, antialias=True).contiguous()
