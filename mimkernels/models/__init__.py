"""Masked image modeling models, whose encoders are timm Vision Transformers (needs ``mimkernels[train]``)."""

from mimkernels.models.checkpoint import CheckpointReport
from mimkernels.models.mae import MAE, MAEOutput
from mimkernels.models.pictures import MAEPictures

__all__ = ["MAE", "CheckpointReport", "MAEOutput", "MAEPictures"]
