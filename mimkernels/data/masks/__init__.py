"""Which patches of an image or video are masked: the strategies of published methods behind one interface."""

from mimkernels.data.masks.batch import MaskBatch, Ragged
from mimkernels.data.masks.sampler import STRATEGIES, MaskSampler

__all__ = ["STRATEGIES", "MaskBatch", "MaskSampler", "Ragged"]
