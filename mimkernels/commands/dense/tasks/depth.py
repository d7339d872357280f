"""Depths of pixels, by a linear layer."""

import torch
from torch import Tensor

from mimkernels.commands.dense.data import DenseData, DenseImages
from mimkernels.commands.dense.heads import LinearDepth, train
from mimkernels.commands.dense.metrics import DepthScores, depth_scores, valid_depths
from mimkernels.commands.dense.tasks.base import Job, PictureRow, Reading, Task, figure, percent
from mimkernels.engine.figures import enlarged, png_address

# Metres and relative error: ends of the colours of depth, unless all is nearer, and of its errors.
_NEAR, _WRONG = 1.0, 0.5


class Depth(Task[DepthScores]):
    """One linear layer to weights of fixed depths, whose mean is the depth."""

    name = "depth"
    targets = ("depths",)
    explanation = (
        "Depth of each image by itself, then averaged: d1, d2 and d3 are the shares of pixels off by a factor of less "
        "than 1.25, its square and its cube."
    )
    columns = ("RMSE, m", "abs rel", "d1", "d2", "d3")
    curves = {"RMSE, m": lambda scores: scores.rmse}  # noqa: RUF012
    picture_title = "Depth"

    def check_loaded(self, data: DenseData) -> None:
        depths, (low, high) = data.train.target("depths"), data.depth_range
        if not valid_depths(depths, low, high).any():
            raise ValueError(
                f"no pixel of the {data.content} to learn from has a depth between {low:g} m and "
                f"{high:g} m; they are from {float(depths.min()):g} m to {float(depths.max()):g} m"
            )

    def read(self, job: Job) -> Reading[DepthScores]:
        config, (low, high) = job.config, job.data.depth_range
        head = LinearDepth(job.channels, low, high, config.depth_bins)
        depths = job.train.truth.target("depths")
        losses = train(head, job.train.maps, depths, config, config.weight_decay / 10, job.device, job.what)
        shown, pairs = job.predictions(head.eval(), "depths")
        return Reading(depth_scores(pairs, low, high), shown, losses)

    def worth(self, scores: DepthScores) -> float:
        return -scores.rmse

    def summary(self, scores: DepthScores) -> str:
        return f"RMSE {figure(scores.rmse, '.3f', ' m')}"

    def cells(self, scores: DepthScores) -> list[str]:
        return [
            *(figure(value, ".3f") for value in (scores.rmse, scores.abs_rel)),
            *map(percent, (scores.d1, scores.d2, scores.d3)),
        ]

    def picture_text(self, data: DenseData, shown: DenseImages) -> str:
        near, far = _ends(data, shown)
        return (
            f"Bright is near, from {near:g} m to {far:.2g} m. Errors from 0, black, to {_WRONG:.0%} of the depth or "
            "more, bright."
        )

    def true_rows(self, data: DenseData, shown: DenseImages) -> list[PictureRow]:
        return [("depth", _mapped(shown.target("depths"), *_ends(data, shown), "viridis_r", _valid(data, shown)))]

    def read_rows(self, data: DenseData, shown: DenseImages, label: str, predictions: Tensor) -> list[PictureRow]:
        depths = shown.target("depths")
        error, valid = (predictions - depths).abs() / depths, _valid(data, shown)
        return [
            (label, _mapped(predictions, *_ends(data, shown), "viridis_r", torch.ones_like(valid))),
            ("relative error", _mapped(error, 0.0, _WRONG, "magma", valid)),
        ]


def _valid(data: DenseData, shown: DenseImages) -> Tensor:
    """``[n, H, W]`` which depths count."""
    return valid_depths(shown.target("depths"), *data.depth_range)


def _ends(data: DenseData, shown: DenseImages) -> tuple[float, float]:
    """The depths at the ends of the colours, those of all pictures together."""
    counted = shown.target("depths")[_valid(data, shown)]
    far = float(counted.max()) if len(counted) else data.depth_range[1]
    return _NEAR if far > _NEAR else 0.0, far


def _mapped(values: Tensor, low: float, high: float, name: str, valid: Tensor) -> list[str]:
    """Colours of values, black where they are not valid."""
    import matplotlib

    colours = matplotlib.colormaps[name]
    made = []
    for each, known in zip(values, valid, strict=True):
        scaled = ((each.float() - low) / (high - low)).clamp(0, 1)
        picture = torch.from_numpy(colours(scaled.numpy())[..., :3]).permute(2, 0, 1).float()
        made.append(png_address(enlarged(picture * known)))
    return made
