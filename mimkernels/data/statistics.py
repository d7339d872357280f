"""Mean and deviation of a data set's pixels, by which a model normalises its images."""

import contextlib

import numpy as np

from mimkernels.data.batches import UNREADABLE, to_pixels
from mimkernels.data.sources import Source

__all__ = ["measure_statistics"]

_IMAGES = 2048  # enough for three digits; more would only take longer


def measure_statistics(source: Source, in_chans: int, images: int = _IMAGES) -> tuple[list[float], list[float]]:
    """Mean and deviation of every channel in [0, 1], over `images` spread over the source, each counting the same.

    Raises:
        ValueError: none of them can be read, or a channel is the same everywhere.
    """
    moments = []
    for index in range(0, len(source), max(1, len(source) // images)):
        with contextlib.suppress(*UNREADABLE):
            pixels = to_pixels(source.read(index), in_chans).numpy().reshape(in_chans, -1) / 255.0
            moments.append((pixels.mean(1), np.square(pixels).mean(1)))
    if not moments:
        raise ValueError(f"pixel_stats data: none of the images of {source.name!r} that were tried can be read")
    mean, square = np.array(moments).mean(0)
    deviation = np.sqrt(np.maximum(square - np.square(mean), 0))
    if deviation.min() < 1e-4:
        raise ValueError(f"pixel_stats data: a channel of {source.name!r} has the same value in all pixels")
    return mean.tolist(), deviation.tolist()
