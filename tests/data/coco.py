"""A made folder of COCO's keypoints."""

import json

import numpy as np
from PIL import Image

from mimkernels.data.joints import JOINTS


def annotation(number, image, box, joints, **changes):
    """`joints` by their number: (x, y, flag)."""
    keypoints = [0] * (3 * len(JOINTS))
    for joint, values in joints.items():
        keypoints[3 * joint : 3 * joint + 3] = values
    return {
        "id": number, "image_id": image, "category_id": 1, "iscrowd": 0, "bbox": list(box), "area": box[2] * box[3] / 2,
        "keypoints": keypoints, "num_keypoints": len(joints), **changes,
    }  # fmt: skip


def make_coco(root, *, train=None, val=None, images_below=""):
    """Two images a split, in each of which one pixel is white: (12, 9) of the first and (0, 0) of the second."""
    (root / "annotations").mkdir(parents=True)
    for split, given in (("train", train), ("val", val)):
        folder = root / images_below / f"{split}2017"
        folder.mkdir(parents=True)
        for name, (x, y) in (("a.png", (12, 9)), ("b.png", (0, 0))):
            pixels = np.zeros((30, 40, 3), np.uint8)
            pixels[y, x] = 255
            Image.fromarray(pixels).save(folder / name)
        content = {
            "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}],
            "annotations": [
                annotation(1, 7, (8, 5, 8, 8), {0: (12, 9, 2), 5: (14, 9, 1)}),
                annotation(2, 8, (0, 0, 8, 16), {0: (0, 0, 2), 9: (30, 2, 2)}),
            ],
        }
        content.update(given or {})
        (root / "annotations" / f"person_keypoints_{split}2017.json").write_text(json.dumps(content))
    return root
