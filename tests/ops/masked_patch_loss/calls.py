"""Calls of masked_patch_loss, good and refused."""

import math

import torch

IDS = torch.tensor([[0, 3], [5, 1]])
MASK = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 1, 0]])
IMAGES = torch.rand(2, 3, 8, 12)
PRED = torch.randn(2, 2, 48)

CALL = {
    "pred": torch.randn(2, 6, 48),
    "images": IMAGES,
    "mask": MASK,
    "patch_size": 4,
    "norm_pix": False,
    "local_norm": None,
    "kind": "smooth_l1",
    "beta": 1.0,
    "mean": [0.5] * 3,
    "std": [0.2] * 3,
}
VARIANTS = {"masked_patch_loss": {"kind": "mse", "norm_pix": True}}
LEAST = {"pred": PRED, "images": IMAGES, "ids": IDS, "patch_size": 4}
FINE = torch.ones(2, 4, 6)
CELLS = {"pred": CALL["pred"], "ids": None, "mask": FINE}
REFUSED = [
    ({"pred": PRED[:1]}, ValueError, r"pred \[1, 2, 48\] has size 1 in dimension 0 but images"),
    ({"pred": PRED[..., :47]}, ValueError, "has 47 pixels per patch but 3 channels of patch size 4 have 48"),
    ({"mask": torch.ones(2, 6)}, ValueError, "give exactly one of ids and mask, got both"),
    ({"ids": None}, ValueError, "give exactly one of ids and mask, got neither"),
    ({"ids": IDS[:, :1]}, ValueError, r"ids \[2, 1\] and pred \[2, 2, 48\] must agree"),
    ({"ids": None, "mask": torch.ones(2, 6)}, ValueError, "must hold all 6 patches of images .* got 2"),
    ({"kind": "l2"}, ValueError, "kind must be one of mse, l1, smooth_l1, got 'l2'"),
    ({"layout": "nchw"}, ValueError, "layout must be 'channels_last' or 'channels_first', got 'nchw'"),
    ({"reduction": "sum"}, ValueError, "reduction must be 'mean' or 'none', got 'sum'"),
    ({"kind": "smooth_l1", "beta": 0.0}, ValueError, "beta must be positive, got 0.0"),
    ({"images": IMAGES.byte()}, ValueError, "uint8 images need mean and std"),
    ({"patch_size": 3}, ValueError, "patch height 3 does not divide the image height 8"),
    ({"kind": "mse", "beta": math.nan}, ValueError, "beta must be finite, got nan"),
    ({"local_norm": 4}, ValueError, "local_norm must be an odd number of pixels of at least 3, got 4"),
    ({"local_norm": 1}, ValueError, "local_norm must be an odd number of pixels of at least 3, got 1"),
    ({"local_norm": 4.5}, TypeError, "local_norm must be an int, got float"),
    ({"local_norm": 7, "norm_pix": True}, ValueError, "norm_pix normalises targets by their patch and local_norm 7"),
    (CELLS | {"mask": FINE[:1]}, ValueError, r"mask \[1, 4, 6\] has size 1 in dimension 0 but images"),
    (CELLS | {"mask": FINE[:, :3]}, ValueError, r"has 3 rows; images \[2, 3, 8, 12\] have 2 of patches"),
    (CELLS | {"mask": torch.ones(2, 2, 9)}, ValueError, "has 9 columns; .* have 3 of patches, each of 4 pixels"),
    (CELLS | {"pred": PRED}, ValueError, "must hold all 6 patches of images .* got 2"),
    ({"mean": [0.5] * 3, "std": [0.2, 0.0, 0.2]}, ValueError, "std must be positive, got 0.0"),
]
