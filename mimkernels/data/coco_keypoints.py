"""Persons with labelled joints from COCO's folders, each cut out by its box."""

import hashlib
import json
import math
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mimkernels.data.joints import JOINTS, UNLABELLED, VISIBLE, Persons
from mimkernels.data.pixels import Decoder, data_folder, drawn

_PADDED = 1.25  # side of the square that is cut out, over the larger side of the box


class _Person(NamedTuple):
    file: str
    size: tuple[int, int] | None  # width and height of the whole image, where the annotations say them
    joints: np.ndarray  # [17, 3] x, y and flag in the whole image, as pixels' numbers
    box: tuple[float, float, float, float]  # left, top, width, height
    area: float


class CocoPersons:
    """Persons of one split of COCO's keypoints of 2017; the annotations are read at once, images by ``load``.

    Below `root` lie ``annotations/person_keypoints_{split}2017.json`` and the images, in ``{split}2017`` or
    ``images/{split}2017``. Persons count that have a labelled joint, are no crowd, and whose box and area are not
    empty.

    Args:
        root: the folder of the data set.
        split: ``train`` or ``val``.
        count: most persons; if there are more, so many of them are drawn by `seed`.
        decoder: how images are read.

    Raises:
        ValueError: a folder or a file is missing, the annotations are not COCO's, two images have one id, or a file
            name leads out of the folder of the images.
    """

    def __init__(self, root: str | Path, split: str, count: int, seed: int, decoder: Decoder | None = None) -> None:
        self.root, self.decoder = data_folder(root, "coco-keypoints"), decoder or Decoder()
        self.annotations = self.root / "annotations" / f"person_keypoints_{split}2017.json"
        folders = [self.root / f"{split}2017", self.root / "images" / f"{split}2017"]
        if not self.annotations.is_file():
            raise ValueError(
                f"data 'coco-keypoints': no file {str(self.annotations)!r}; {str(root)!r} must hold annotations/ with "
                "person_keypoints_train2017.json and person_keypoints_val2017.json"
            )
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if folder is None:
            raise ValueError(f"data 'coco-keypoints': no folder {' or '.join(repr(str(place)) for place in folders)}")
        self.folder = folder
        persons = self._read_annotations()
        self.persons = persons = [persons[i] for i in drawn(len(persons), count, seed)]
        names = sorted({person.file for person in persons})
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{len(missing):,} of {len(names):,} images that {str(self.annotations)!r} names are missing, such as "
                f"{str(folder / missing[0])!r}"
            )

    def __len__(self) -> int:
        return len(self.persons)

    def fingerprint(self) -> str:
        """Changes when the persons, their places and sizes, or the sizes or times of change of their files change."""
        made = hashlib.sha256()
        for person in self.persons:
            status = (self.folder / person.file).stat()
            state = (person.file, person.size, status.st_size, status.st_mtime_ns, person.box)
            made.update(repr(state).encode(errors="surrogateescape"))
        return f"coco-keypoints/{len(self)}/{made.hexdigest()[:16]}"

    def load(self, side: int) -> Persons:
        """Every person in a square of `side` pixels: its box in the middle, padded by 1.25, black beyond the image.

        COCO's places are numbers of pixels, whose middles are half a pixel further on. A joint beyond the square counts
        as not labelled. An image is turned upright unless it is stored in the size that the annotations say.

        Raises:
            ValueError: an image cannot be read, or has another size than the annotations say, stored and upright, or a
                square would be larger than what images may be.
        """
        made = []
        opened: tuple[tuple[str, tuple[int, int] | None], Image.Image] | None = None
        for person in self.persons:
            try:
                wanted = (person.file, person.size)
                if opened is None or opened[0] != wanted:
                    opened = (wanted, self.decoder.read(self.folder / person.file, person.size).convert("RGB"))
                made.append(_cut_out(person, opened[1], side, self.decoder.max_pixels))
            except (OSError, ValueError) as e:
                raise ValueError(f"image {str(self.folder / person.file)!r} cannot be read: {e}") from e
        return Persons(*(np.stack(parts) for parts in zip(*made, strict=True)))

    def _read_annotations(self) -> list[_Person]:
        def fits(condition: bool, what: str, value: Any) -> None:
            if not condition:
                raise ValueError(f"{str(self.annotations)!r}: expected {what}, got {str(value)[:80]!r}")

        try:
            content = json.loads(self.annotations.read_bytes())
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{str(self.annotations)!r} is not JSON: {e}") from e
        for name in ("images", "annotations"):
            entries = content.get(name) if isinstance(content, dict) else None
            fits(isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries),
                 f"a list of objects as {name!r}", entries)  # fmt: skip
        files: dict[int, tuple[str, tuple[int, int] | None]] = {}
        for entry in content["images"]:
            number, name = entry.get("id"), entry.get("file_name")
            fits(isinstance(number, int) and isinstance(name, str), "an image with id and file_name", entry)
            fits(_stays_inside(name), "a file_name within the folder of the images", name)
            size = entry.get("width"), entry.get("height")
            fits(size == (None, None) or all(type(side) is int and side > 0 for side in size),
                 "a width and a height of an image as whole numbers", entry)  # fmt: skip
            if number in files:
                raise ValueError(
                    f"{str(self.annotations)!r}: two images have the id {number}, {files[number][0]!r} and {name!r}"
                )
            files[number] = name, None if size[0] is None else size
        persons = []
        for entry in content["annotations"]:
            joints = _numbers(entry.get("keypoints"), 3 * len(JOINTS))
            box, area = _numbers(entry.get("bbox"), 4), _numbers([entry.get("area")], 1)
            fits(joints is not None, f"{3 * len(JOINTS)} numbers as keypoints", entry.get("keypoints"))
            fits(box is not None, "4 numbers as bbox", entry.get("bbox"))
            fits(area is not None, "a number as area", entry.get("area"))
            assert joints is not None and box is not None and area is not None
            flags = joints[2::3]
            fits(bool(np.isin(flags, range(UNLABELLED, VISIBLE + 1)).all()), "flags 0, 1 or 2", flags)
            fits(entry.get("image_id") in files, "the id of an image as image_id", entry.get("image_id"))
            if entry.get("iscrowd") or not _labelled(joints.reshape(-1, 3), box).any() or area[0] <= 0:
                continue
            left, top, width, height = box.tolist()
            where = (left, top, width, height)
            persons.append(_Person(*files[entry["image_id"]], joints.reshape(-1, 3), where, float(area[0])))
        fits(bool(persons), "persons with labelled joints", "none")
        return persons


def _stays_inside(name: str) -> bool:
    """Whether a file's name leads nowhere out of its folder, on any system."""
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    rooted = windows.anchor or posix.is_absolute()
    return bool(name) and "\0" not in name and not rooted and ".." not in windows.parts and ".." not in posix.parts


def _numbers(values: object, count: int) -> np.ndarray | None:
    """So many finite numbers as fp64, or None if they are anything else."""
    if not isinstance(values, list) or len(values) != count:
        return None
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return None
    try:
        made = np.array(values, np.float64)
    except OverflowError:
        return None
    return made if np.isfinite(made).all() else None


def _square(box: np.ndarray) -> tuple[float, float, float]:
    """Left, top and side of the square that is cut out."""
    left, top, width, height = box.tolist()
    side = _PADDED * max(width, height)
    return left + width / 2 - side / 2, top + height / 2 - side / 2, side


def _labelled(joints: np.ndarray, box: np.ndarray) -> np.ndarray:
    """``[17]`` whether joints are labelled and lie in the square; none does of an empty box."""
    if min(box[2], box[3]) <= 0:
        return np.zeros(len(joints), bool)
    left, top, side = _square(box)
    offset = joints[:, :2] + 0.5 - [left, top]
    return (joints[:, 2] != UNLABELLED) & ((offset >= 0) & (offset < side)).all(1)


def _cut_out(
    person: _Person, image: Image.Image, side: int, max_pixels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Image, joints, box and area of a person, in pixels of the square."""
    box = np.array(person.box)
    left, top, extent = _square(box)
    if extent**2 > max_pixels:
        raise ValueError(f"the square around a box of {box[2]:g} x {box[3]:g} is larger than max_pixels {max_pixels:,}")
    # Pillow cuts whole pixels, black beyond the image; the square lies anywhere between them.
    first = math.floor(left), math.floor(top)
    part = image.crop((*first, math.ceil(left + extent), math.ceil(top + extent)))
    inner = left - first[0], top - first[1]
    corners = (*inner, min(inner[0] + extent, part.width), min(inner[1] + extent, part.height))
    pixels = part.resize((side, side), Image.Resampling.BILINEAR, box=corners)
    scale = side / extent
    labelled = _labelled(person.joints, box)
    joints = person.joints.copy()
    joints[:, :2] = (joints[:, :2] + 0.5 - [left, top]) * scale
    joints[~labelled] = 0
    placed = np.array([(box[0] - left) * scale, (box[1] - top) * scale, box[2] * scale, box[3] * scale])
    return (
        np.asarray(pixels).transpose(2, 0, 1),
        joints.astype(np.float32),
        placed.astype(np.float32),
        np.array(person.area * scale**2, np.float32),
    )
