"""The joints of COCO's persons, and what belongs to them."""

from typing import NamedTuple

import numpy as np

JOINTS = (
    "nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder", "left elbow",
    "right elbow", "left wrist", "right wrist", "left hip", "right hip", "left knee", "right knee", "left ankle",
    "right ankle",
)  # fmt: skip

# Pairs of numbers of joints that a line connects. Left and right are the person's own.
BONES = (
    (0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12), (11, 12), (11, 13),
    (13, 15), (12, 14), (14, 16),
)  # fmt: skip

# Standard deviation of annotators' places of each joint, over the root of a person's area: COCO's.
SIGMAS = (
    0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089,
    0.089,
)  # fmt: skip

UNLABELLED, HIDDEN, VISIBLE = 0, 1, 2  # COCO's flags


class Persons(NamedTuple):
    """Pictures with one person each, in coordinates of the picture: pixel i covers i to i + 1.

    Attributes:
        images: ``[n, 3, S, S]`` uint8.
        joints: ``[n, 17, 3]`` float32: x, y and the flag of ``JOINTS``; x and y are 0 where the flag is ``UNLABELLED``.
        boxes: ``[n, 4]`` float32: left, top, width and height.
        areas: ``[n]`` float32, pixels that the person covers.
    """

    images: np.ndarray
    joints: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
