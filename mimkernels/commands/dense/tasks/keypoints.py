"""Places of joints, by heat maps of a linear layer."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mimkernels.commands.dense.charts import bar_chart
from mimkernels.commands.dense.data import DenseData, DenseImages
from mimkernels.commands.dense.heads import predict, train
from mimkernels.commands.dense.heat_maps import LinearKeypoints
from mimkernels.commands.dense.keypoint_metrics import KeypointScores, keypoint_scores
from mimkernels.commands.dense.tasks.base import ChartSection, Job, PictureRow, Reading, Task, percent
from mimkernels.data.joints import BONES, HIDDEN, JOINTS, SIGMAS
from mimkernels.engine.figures import as_colour, enlarged, png_address

_LEFT, _RIGHT, _MIDDLE = "#ff9d3c", "#5cb8ff", "#f5f7f9"  # of bones, on grey
_OFF = "#ff3b3b"
_SHARE = 0.1  # of the box's larger side, from which a joint counts as wrong in pictures


class Keypoints(Task[KeypointScores]):
    """A heat map per joint, linear in the features, and its highest place."""

    name = "keypoints"
    targets = ("keypoints", "boxes", "areas")
    explanation = (
        "Keypoints over all labelled joints, hidden ones too: PCK is the share of joints that are off by less than a "
        "tenth and a fifth of the larger side of the person's box; AP the mean of the average precisions at COCO's "
        "similarities (OKS) of 0.50 to 0.95, AP50 and AP75 those at 0.5 and 0.75."
    )
    columns = ("PCK@0.1", "PCK@0.2", "AP", "AP50", "AP75")
    curves = {  # noqa: RUF012
        "PCK@0.1, %": lambda scores: 100 * scores.pck_10,
        "AP, %": lambda scores: 100 * scores.ap,
    }
    picture_title = "Keypoints"

    def read(self, job: Job) -> Reading[KeypointScores]:
        config, truth = job.config, job.test.truth
        head = LinearKeypoints(job.channels, len(JOINTS), config.side)
        joints = job.train.truth.target("keypoints")
        losses = train(head, job.train.maps, joints, config, config.weight_decay, job.device, job.what)
        predicted = predict(head.eval().predict, job.test.maps, job.size, job.device)
        joints, boxes, areas = (truth.target(name) for name in self.targets)
        return Reading(keypoint_scores(predicted, joints, boxes, areas, SIGMAS), predicted, losses)

    def worth(self, scores: KeypointScores) -> float:
        return scores.pck_10

    def summary(self, scores: KeypointScores) -> str:
        return f"PCK@0.1 {percent(scores.pck_10)}"

    def cells(self, scores: KeypointScores) -> list[str]:
        return [percent(score) for score in scores[:5]]

    def numbers(self, scores: KeypointScores) -> dict[str, object]:
        return {**scores._asdict(), "joints": list(JOINTS)}

    def sections(self, data: DenseData, scores: Mapping[str, KeypointScores]) -> list[ChartSection]:
        """PCK joint by joint, left and right together; of a joint that is labelled nowhere, the other one's."""
        names = list(dict.fromkeys(name.split()[-1] for name in JOINTS))
        numbers = [[i for i, joint in enumerate(JOINTS) if joint.split()[-1] == name] for name in names]
        bars = {
            label: [100 * _mean([each.joint_pck_10[i] for i in both]) for both in numbers]
            for label, each in scores.items()
        }
        groups = [name if len(both) == 1 else f"{name}s" for name, both in zip(names, numbers, strict=True)]
        text = (
            "PCK@0.1, the mean of left and right, or that of the one that is labelled. Of every model, the layers that "
            "are best."
        )
        return [ChartSection("Joint by joint", text, bar_chart(groups, bars, "PCK@0.1, %", 100))]

    def picture_text(self, data: DenseData, shown: DenseImages) -> str:
        return (
            "Bones between labelled joints; hidden joints are rings. Of what was read, a red line leads to the true "
            "place of each joint that is off by a tenth of the box's larger side or more."
        )

    def legend(self, data: DenseData) -> list[tuple[str, str]]:
        return [("the person's left", _LEFT), ("right", _RIGHT)]

    def true_rows(self, data: DenseData, shown: DenseImages) -> list[PictureRow]:
        joints = shown.target("keypoints")
        return [("joints", [_skeleton(*each) for each in zip(shown.images, joints, joints, strict=True)])]

    def read_rows(self, data: DenseData, shown: DenseImages, label: str, predictions: Tensor) -> list[PictureRow]:
        joints, sides = shown.target("keypoints"), shown.target("boxes")[:, 2:].amax(1)
        made = []
        for image, true, places, side in zip(shown.images, joints, predictions, sides, strict=True):
            made.append(_skeleton(image, true, places, float(side)))
        return [(label, made)]


def _mean(values: list[float]) -> float:
    """Of those that there are; NaN without any."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _skeleton(image: Tensor, joints: Tensor, places: Tensor, box_side: float | None = None) -> str:
    """Bones between `places` of the joints that are labelled, over the image in grey.

    Args:
        joints: ``[K, 3]`` true places and flags.
        box_side: if it is given, lines lead from places that are off to the true ones.
    """
    base = enlarged(0.5 * as_colour(image).mean(0, keepdim=True) + 0.1)
    scale = base.shape[-1] / image.shape[-1]
    picture = Image.fromarray((base[0] * 255).round().to(torch.uint8).numpy()).convert("RGB")
    draw = ImageDraw.Draw(picture)
    true = [(scale * float(x), scale * float(y)) for x, y, _ in joints]
    read = [(scale * float(x), scale * float(y)) for x, y, _ in places]
    flags = joints[:, 2].tolist()
    width = max(2, round(picture.width / 64))
    for a, b in BONES:
        if flags[a] and flags[b]:
            draw.line([read[a], read[b]], fill=_colour(a, b), width=width)
    for number, (x, y) in enumerate(read):
        if not flags[number]:
            continue
        off = box_side is not None and np.hypot(x - true[number][0], y - true[number][1]) >= _SHARE * box_side * scale
        if off:
            draw.line([(x, y), true[number]], fill=_OFF, width=max(1, width // 2))
        ends = [x - width, y - width, x + width, y + width]
        inside = None if flags[number] == HIDDEN else _colour(number)
        draw.ellipse(ends, fill=inside, outline=_OFF if off else _colour(number), width=1)
    return png_address(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)


def _colour(*joints: int) -> str:
    """Of a joint, or of a bone between two of them."""
    sides = {JOINTS[joint].split()[0] for joint in joints} & {"left", "right"}
    if len(sides) != 1:
        return _MIDDLE
    return _LEFT if "left" in sides else _RIGHT
