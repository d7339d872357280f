"""Calls of mask_from_noise, good and refused."""

import torch

CALL = {"noise": torch.rand(2, 6), "keep": 2}
