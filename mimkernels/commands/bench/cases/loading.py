"""Batches from JPEG files, as the published code loads them and as the trainer does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler
from torchvision import datasets, transforms

from mimkernels.data.batches import Augmentation, BatchPlan, PretrainImages, make_loader, start_worker
from mimkernels.data.sources import open_source

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PICTURES = 256
_SIZE = (375, 500)  # the usual height and width of ImageNet's
_CROP_SCALE = 0.2
_ENDLESS = 10**6  # steps


class Pictures:
    """A folder of JPEG files, removed at the end of the block; smooth noise, which compresses as photographs do."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mimkernels-bench-")
        folder = Path(self._folder.name) / "pictures" / "class"
        folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(0)
        for number in range(_PICTURES):
            coarse = 255 * torch.rand(1, 3, 24, 32, generator=generator)
            fine = 24 * torch.rand(3, *_SIZE, generator=generator) - 12
            picture = F.interpolate(coarse, _SIZE, mode="bicubic")[0] + fine
            pixels = picture.clamp(0, 255).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)
        self.root = folder.parent

    def __enter__(self) -> Pictures:
        return self

    def __exit__(self, *_) -> None:
        self._folder.cleanup()

    def published(self, batch: int, workers: int) -> Iterator[Tensor]:
        """fp32 ``[B, 3, 224, 224]``, normalised in the workers."""
        augmentation = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    224, scale=(_CROP_SCALE, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )
        images = datasets.ImageFolder(self.root, augmentation)
        loader = DataLoader(
            images,
            batch_size=batch,
            sampler=RandomSampler(images, replacement=True, num_samples=batch * _ENDLESS),
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_worker,
        )
        for loaded, _ in loader:
            yield loaded

    def trainer(self, batch: int, workers: int) -> Iterator[Tensor]:
        """uint8 ``[B, 3, 224, 224]``, which the kernels normalise."""
        images = PretrainImages(open_source(str(self.root)), Augmentation(224, 3, _CROP_SCALE, hflip=True), seed=0)
        plan = BatchPlan(len(images), batch, accum_steps=1, processes=1, seed=0)
        loader = make_loader(
            images,
            plan,
            rank=0,
            first_step=0,
            last_step=_ENDLESS,
            workers=workers,
            pin_memory=torch.cuda.is_available(),
        )
        for loaded in loader:
            yield loaded.images
