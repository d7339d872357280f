"""Masked-image-modelling pre-training: configuration, data, the loop, checkpoints and the report.

Nothing heavy is imported here; ``mimkernels.train.loop`` needs the ``train`` extra.
"""

from mimkernels.train.config import PretrainConfig
from mimkernels.train.errors import TrainingError

__all__ = ["PretrainConfig", "TrainingError"]
