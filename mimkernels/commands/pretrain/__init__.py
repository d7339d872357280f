"""Masked-image-modelling pre-training: configuration, data, the loop, checkpoints and the report.

Nothing heavy is imported here; ``mimkernels.commands.pretrain.loop`` needs the ``train`` extra.
"""

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.engine.errors import TrainingError

__all__ = ["PretrainConfig", "TrainingError"]
