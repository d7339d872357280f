"""Folders as ADE20K and NYUv2 have them, of made pictures."""

import numpy as np
from PIL import Image


def colour(path, height=6, width=8, level=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), level, np.uint8)).save(path)


def values(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def ade(root, names=True):
    """Two training images and a validation image; in row r, column c, labels are r + c and up to 150."""
    for part, count in (("training", 2), ("validation", 1)):
        for number in range(count):
            labels = np.add.outer(np.arange(6), np.arange(8)).astype(np.uint8)
            labels[5, 7] = 150
            colour(root / "images" / part / f"{number}.jpg")
            values(root / "annotations" / part / f"{number}.png", labels)
    if names:
        rows = ["Idx\tRatio\tTrain\tVal\tName", "1\t0.1576\t11664\t1172\twall", "2\t0.1\t6046\t612\tbuilding, edifice"]
        rows += [f"{number}\t0.1\t1\t1\tclass {number}" for number in range(3, 151)]
        (root / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    return root


def nyu(root, level=2500):
    """A training pair in a scene of its own, and a test pair of 480 x 640 pixels."""
    depths = np.full((6, 8), level, np.uint16)
    depths[0, 0] = 0
    colour(root / "sync" / "kitchen_1" / "rgb_00007.jpg")
    values(root / "sync" / "kitchen_1" / "sync_depth_00007.png", depths)
    colour(root / "official_splits" / "test" / "bath" / "rgb_00001.png", 480, 640)
    values(root / "official_splits" / "test" / "bath" / "sync_depth_00001.png", np.full((480, 640), level, np.uint16))
    return root
