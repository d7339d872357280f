"""Modules and functions of Vision Transformers, built on the ops."""

from mimkernels.nn.embed import embed_visible
from mimkernels.nn.positions import sincos_positions_2d

__all__ = ["embed_visible", "sincos_positions_2d"]
