"""Published recipes as settings; what the command line gives besides comes before them.

Learning rates are for 256 images here and for 512 in most published tables: half as large for the same run. Batches are
those of one process in the published runs, which had 16, of dBOT 32.
"""

from typing import Any

__all__ = ["PRESETS"]

_SIMMIM: dict[str, Any] = {
    "method": "simmim", "img_size": 192, "mask_unit": 32, "mask_ratio": 0.6, "target": "pixels", "loss": "l1",
    "crop_scale": 0.67, "hflip": True, "batch_size": 128, "beta2": 0.999, "weight_decay": 0.05, "clip_grad": 5.0,
    "warmup_epochs": 10.0,
}  # fmt: skip
_SIMMIM_100: dict[str, Any] = {
    **_SIMMIM, "epochs": 100, "schedule": "cosine", "blr": 1e-4, "warmup_blr": 5e-7, "min_blr": 5e-6,
}  # fmt: skip
_SIMMIM_800: dict[str, Any] = {
    **_SIMMIM, "epochs": 800, "schedule": "step", "step_epoch": 700.0, "blr": 5e-5, "warmup_blr": 2.5e-7,
}  # fmt: skip
_SWIN_B = {"model": "swin_base_patch4_window7_224", "model_kwargs": {"window_size": 6, "drop_path_rate": 0.0}}
_SWIN_L = {"model": "swin_large_patch4_window7_224", "model_kwargs": {"window_size": 12, "drop_path_rate": 0.0}}
_SWIN_V2_B = {"model": "swinv2_base_window12_192", "model_kwargs": {"drop_path_rate": 0.1}}
_VIT_B = {"model": "beit_base_patch16_224", "img_size": 224, "model_kwargs": {"drop_path_rate": 0.1}}
# As BEiT v2 trains around such targets.
_TEACHER: dict[str, Any] = {
    **_VIT_B, "method": "simmim", "mask_unit": 16, "masking": "block", "mask_ratio": 0.4, "crop_scale": 0.2,
    "hflip": True, "batch_size": 128, "epochs": 300, "warmup_epochs": 10.0, "blr": 1.875e-4, "beta2": 0.999,
    "weight_decay": 0.05, "clip_grad": 3.0,
}  # fmt: skip
# Random teacher, encoder and decoder as of MAE; the published rate is for 256 images, too, in batches of 4096.
_DBOT: dict[str, Any] = {
    "method": "mae", "model": "vit_base_patch16_224", "model_kwargs": {"drop_path_rate": 0.2}, "img_size": 224,
    "decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16, "masking": "random", "mask_ratio": 0.75,
    "target": "bootstrap:stages=2,layer=11,norm=ln,loss=smooth-l1,beta=2", "crop_scale": 0.2, "hflip": True,
    "batch_size": 128, "beta2": 0.95, "blr": 1.5e-4, "weight_decay": 0.05, "clip_grad": 3.0,
}  # fmt: skip
_CLIP = "features:vit_base_patch16_clip_224.openai"

PRESETS: dict[str, dict[str, Any]] = {
    "simmim-vit-b-800": {**_SIMMIM_800, **_VIT_B},
    "simmim-swin-b-100": {**_SIMMIM_100, **_SWIN_B},
    "simmim-swin-b-800": {**_SIMMIM_800, **_SWIN_B},
    "simmim-swin-l-800": {**_SIMMIM_800, **_SWIN_L},
    "simmim-swinv2-b-800": {**_SIMMIM_800, **_SWIN_V2_B, "target": "local-norm:47"},
    "maskdistill-vit-b-300": {**_TEACHER, "target": f"{_CLIP}:norm=ln,loss=smooth-l1"},
    "feature-distillation-vit-b-300": {
        **_TEACHER,
        "masking": "none",
        "mask_ratio": None,
        "target": f"{_CLIP}:tokens=all,beta=2",
    },
    "data2vec-vit-b-800": {
        **_TEACHER,
        "epochs": 800,
        "mask_ratio": 0.6,
        "target": "ema:layers=10,beta=2",
        "momentum": 0.9998,
    },
    # Two stages of 800 epochs, each with a warm-up of 40.
    "dbot-vit-b-1600": {**_DBOT, "epochs": 1600, "warmup_epochs": 40.0},
}
