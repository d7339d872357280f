"""Masked image modeling models and their baselines, whose encoders are models of timm (needs ``mimkernels[train]``)."""

from mimkernels.models.captured import CapturedStep, captured_step
from mimkernels.models.checkpoint import CheckpointReport
from mimkernels.models.dino import DINO, DINOOutput
from mimkernels.models.mae import MAE, MAEOutput
from mimkernels.models.mocov3 import MoCoV3, MoCoV3Output
from mimkernels.models.pictures import Pictures
from mimkernels.models.simmim import SimMIM, SimMIMOutput
from mimkernels.models.supervised import Supervised, SupervisedOutput

__all__ = [
    "DINO", "MAE", "CapturedStep", "CheckpointReport", "DINOOutput", "MAEOutput", "MoCoV3", "MoCoV3Output", "Pictures",
    "SimMIM", "SimMIMOutput", "Supervised", "SupervisedOutput", "captured_step",
]  # fmt: skip
