"""Points of an image found again in the image warped, without training."""

from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from mimkernels.commands.dense.data import DenseData, DenseImages
from mimkernels.commands.dense.matching import (
    POINTS,
    CorrespondenceScores,
    Queries,
    correspondence_scores,
    distances,
    matched,
    queries,
)
from mimkernels.commands.dense.tasks.base import Job, PictureRow, Reading, Task, figure, percent
from mimkernels.data.warps import warped_images
from mimkernels.engine.figures import as_colour, enlarged, png_address

_RIGHT, _WRONG = "#2ca02c", "#d62728"
_SHOWN = 4  # every so many points along each axis are drawn
_FINER = 2  # times, while lines are drawn


class Correspondence(Task[CorrespondenceScores]):
    """The most similar patch of the second image."""

    name = "correspondence"
    targets = ()
    explanation = (
        f"Correspondence: of {POINTS} x {POINTS} points of each test image, those that stay visible under a random "
        "warp of it and do not lie on one plain colour are looked for in the warped image, where the features are most "
        "alike. match@0.1 and match@0.05 are the shares that are found within 0.1 and 0.05 of the image's side (PCK); "
        "errors are in pixels."
    )
    columns = ("match@0.1", "match@0.05", "error, px")
    curves = {"match@0.1, %": lambda scores: 100 * scores.pck_10}  # noqa: RUF012
    picture_title = "Correspondence"

    def further_images(self, data: DenseData) -> Tensor:
        return warped_images(data.test.images, data.test.target("warps"))

    def read(self, job: Job) -> Reading[CorrespondenceScores]:
        asked = _queries(job.data.test)
        found = matched(job.test.maps, job.further, asked.points, job.device)
        return Reading(correspondence_scores(found, asked, job.config.side), found)

    def worth(self, scores: CorrespondenceScores) -> float:
        return scores.pck_10

    def summary(self, scores: CorrespondenceScores) -> str:
        return f"match@0.1 {percent(scores.pck_10)}"

    def cells(self, scores: CorrespondenceScores) -> list[str]:
        return [percent(scores.pck_10), percent(scores.pck_5), figure(scores.error, ".1f")]

    def picture_text(self, data: DenseData, shown: DenseImages) -> str:
        asked = _queries(data.test)
        unmoved = correspondence_scores(asked.points.expand_as(asked.places), asked, data.test.images.shape[-1])
        return (
            "Above the image, below it the same warped; lines lead from points, one of 16, to where they were found: "
            "green within 0.1 of the image's side of the right place, red elsewhere. Points left where they were would "
            f"have a match@0.1 of {percent(unmoved.pck_10)}."
        )

    def true_rows(self, data: DenseData, shown: DenseImages) -> list[PictureRow]:
        return [("right places", _drawn(shown, _queries(shown).places))]

    def read_rows(self, data: DenseData, shown: DenseImages, label: str, predictions: Tensor) -> list[PictureRow]:
        return [(f"{label}: matches", _drawn(shown, predictions))]


def _queries(images: DenseImages) -> Queries:
    return queries(images.images, images.target("warps"))


def _drawn(shown: DenseImages, found: Tensor) -> list[str]:
    """Each image above the image warped, and lines from points to where they were found."""
    asked = _queries(shown)
    right = distances(found, asked) < 0.1
    start = _SHOWN // 2
    chosen = [row * POINTS + column for row in range(start, POINTS, _SHOWN) for column in range(start, POINTS, _SHOWN)]
    pictures = []
    pairs = zip(shown.images, warped_images(shown.images, shown.target("warps")), strict=True)
    for number, (first, second) in enumerate(pairs):
        upper, lower = (to_pil_image(enlarged(as_colour(image))) for image in (first, second))
        side, gap = upper.width, max(2, upper.width // 32)
        page = Image.new("RGB", (side, 2 * side + gap), "white")
        page.paste(upper, (0, 0))
        page.paste(lower, (0, side + gap))
        page = page.resize((_FINER * page.width, _FINER * page.height), Image.Resampling.NEAREST)
        draw, dot = ImageDraw.Draw(page), _FINER * max(2, side // 64)
        for point in (point for point in chosen if asked.asked[number, point]):
            colour = _RIGHT if right[number, point] else _WRONG
            ends = []
            for (x, y), top in ((asked.points[point].tolist(), 0), (found[number, point].tolist(), side + gap)):
                ends.append((_FINER * (x + 1) / 2 * side, _FINER * ((y + 1) / 2 * side + top)))
            draw.line(ends, fill=colour, width=_FINER * max(1, side // 160))
            for x, y in ends:
                draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=colour, outline="white")
        page = page.resize((side, 2 * side + gap), Image.Resampling.LANCZOS)
        pictures.append(png_address(pil_to_tensor(page).float() / 255))
    return pictures
