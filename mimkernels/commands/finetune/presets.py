"""Published recipes of fine-tuning as settings; what the command line gives besides comes before them.

Learning rates are for 256 images here, and for 512 in the tables of SimMIM: half as large for the same run. Batches are
those of one process in the published runs: of 32 for MAE, of 16 for SimMIM. Every layer's rate ends at its share of the
smallest one, as in MAE's code; SimMIM's ends all layers at the same.
"""

from typing import Any

__all__ = ["PRESETS"]

_COMMON: dict[str, Any] = {
    "readout": "mean", "img_size": 224, "auto_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.25, "mixup": 0.8,
    "cutmix": 1.0, "label_smoothing": 0.1, "crop_scale": 0.08, "hflip": True, "test_crop": 0.875, "weight_decay": 0.05,
    "beta2": 0.999, "schedule": "cosine",
}  # fmt: skip
_MAE: dict[str, Any] = {**_COMMON, "batch_size": 32, "min_lr": 1e-6, "warmup_epochs": 5.0}
_SIMMIM: dict[str, Any] = {
    **_COMMON, "batch_size": 128, "epochs": 100, "warmup_epochs": 20.0, "blr": 6.25e-4, "min_blr": 1.25e-7,
    "warmup_blr": 1.25e-7, "clip_grad": 5.0,
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "mae-vit-b": {**_MAE, "blr": 5e-4, "epochs": 100, "layer_decay": 0.65, "drop_path": 0.1},
    "mae-vit-l": {**_MAE, "blr": 1e-3, "epochs": 50, "layer_decay": 0.75, "drop_path": 0.2},
    "mae-vit-h": {**_MAE, "blr": 1e-3, "epochs": 50, "layer_decay": 0.75, "drop_path": 0.3},
    "simmim-vit-b": {**_SIMMIM, "layer_decay": 0.65, "drop_path": 0.1},
    "simmim-swin-b-100": {**_SIMMIM, "layer_decay": 0.9, "drop_path": 0.1},
    "simmim-swin-b-800": {**_SIMMIM, "layer_decay": 0.8, "drop_path": 0.1},
    "simmim-swin-l": {**_SIMMIM, "layer_decay": 0.7, "drop_path": 0.2},
    "simmim-swinv2-b": {**_SIMMIM, "layer_decay": 0.75, "drop_path": 0.1},
}
