"""What other libraries' models get from this one."""

from mimkernels.integrations._capture import capture
from mimkernels.integrations._captured import CapturedHeads, CapturedLayer

__all__ = ["CapturedHeads", "CapturedLayer", "capture"]
