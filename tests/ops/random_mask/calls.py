"""Calls of random_mask, good and refused."""

import torch

CALL = {"batch": 2, "tokens": 6, "keep": 2, "seed": 0, "offset": torch.tensor(1)}
NUMBERS = {"offset": 1}
LEAST = {"batch": 2, "tokens": 6, "keep": 2, "seed": 0}
REFUSED = [
    ({"device": "nowhere", "offset": 0}, ValueError, "device 'nowhere'"),
]
