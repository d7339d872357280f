"""Weights that trained poolings give to patches, to be shown beside attention: which tokens a classifier needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimkernels.data.labelled import LabelledImages
from mimkernels.engine.encoder import FrozenEncoder
from mimkernels.engine.readout import train_pooling, why_no_classes

POOLINGS = ("abmilp", "ep")
MOST_BYTES = 512 * 2**20  # of tokens that are kept for training


class LastTokens:
    """The last tokens of the images of a pass, half precision, on the CPU; of some of them, if all are too large.

    Args:
        wanted: keep any.
    """

    def __init__(self, encoder: FrozenEncoder, images: LabelledImages, wanted: bool) -> None:
        self._encoder, self._images = encoder, images
        self.why = "" if encoder.grid is not None else "patches form no grid"
        self.why = self.why or why_no_classes(images.targets)
        per_image = 2 * encoder.num_tokens * encoder.dim
        self._stride = max(1, -(-len(images) * per_image // MOST_BYTES))
        self._wanted = wanted and not self.why
        self._tokens: list[Tensor] = []
        self._positions: list[Tensor] = []

    def add(self, tokens: Tensor, positions: Tensor) -> None:
        """Take ``tokens [B, N, D]`` of the images at `positions`."""
        if self._wanted:
            kept = positions % self._stride == 0
            self._tokens.append(tokens[kept.to(tokens.device)].half().cpu())
            self._positions.append(positions[kept])

    def train(self, shown: Tensor | None) -> dict[str, dict[str, Any]]:
        """``Measured.pooled`` of poolings trained on what was kept; `shown`: last tokens of images, on the device."""
        if not self._tokens or shown is None:
            return {}
        encoder = self._encoder
        assert encoder.grid is not None
        tokens, targets = torch.cat(self._tokens), self._images.targets[torch.cat(self._positions)]
        self._tokens.clear()
        trained = {}
        for name in POOLINGS:
            pooling, accuracy, images = train_pooling(name, tokens, targets, encoder.num_prefix, shown.device)
            with torch.no_grad():
                _, weights = pooling(shown, return_weights=True)
            patches = weights[..., encoder.num_prefix :].mean(1).cpu()
            weights = patches.unflatten(1, encoder.grid)  # mean over the pooling's queries
            trained[name] = {"weights": weights, "accuracy": accuracy, "images": images}
        return trained
