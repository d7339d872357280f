"""Calls of patchify_gather, good and refused."""

import math

import torch

IDS = torch.tensor([[0, 3], [5, 1]])
IMAGES = torch.rand(2, 3, 8, 12)

CALL = {"images": IMAGES, "ids": IDS, "patch_size": 4, "mean": [0.5] * 3, "std": [0.2] * 3}
LEAST = {"images": IMAGES, "ids": IDS, "patch_size": 4}
REFUSED = [
    ({"images": IMAGES[0]}, ValueError, r"images must have 4 or 5 dimensions, got 3 \(\[3, 8, 12\]\)"),
    ({"images": IMAGES.long()}, TypeError, "images must be uint8 or floating point, got torch.int64"),
    ({"patch_size": 5}, ValueError, r"patch height 5 does not divide the image height 8 \(\[2, 3, 8, 12\]\)"),
    ({"patch_size": (4, 5)}, ValueError, "patch width 5 does not divide the image width 12"),
    ({"patch_size": 0}, ValueError, r"patch_size must be positive, got \(0, 0\)"),
    ({"patch_size": (1, 4, 4)}, ValueError, r"patch_size must be an int or \(height, width\)"),
    ({"images": IMAGES.byte()}, ValueError, "uint8 images need mean and std"),
    ({"mean": [0.5] * 3}, ValueError, "mean is given but std is None"),
    ({"mean": 0.5, "std": 0.2}, TypeError, "mean must be a sequence of 3 floats, got 0.5"),
    ({"mean": [0.5], "std": [0.5]}, ValueError, r"mean has shape \[1\] but the images have 3 channels"),
    ({"dtype": torch.int64}, TypeError, "dtype must be floating point, got torch.int64"),
    ({"mean": [0.5, math.nan, 0.5], "std": [0.2] * 3}, ValueError, "mean must be finite, got nan"),
    ({"mean": torch.rand(3, requires_grad=True), "std": [0.2] * 3}, TypeError, "mean gets no gradient"),
    ({"patch_size": (4, 2.0)}, TypeError, "patch_size must be an int, got float"),
]
