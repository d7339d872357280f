"""Image files to pixels of 8 bits per channel, by rules that depend on the file's type and the settings alone."""

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mimkernels.data import MAX_PIXELS

# What the formats' files usually end in, and the formats as Pillow calls them. Its other readers stay closed to what
# merely has such a name: one of them starts Ghostscript.
IMAGE_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")


@dataclass(frozen=True)
class Decoder:
    """Reads an image file as 8 bits per channel.

    =========================== ======================================================================================
    In the file                 What it becomes
    =========================== ======================================================================================
    up to 8 bits per channel    as it is; 1, 2 and 4 bits are spread over 0..255, a palette gives its colours
    alpha, transparent colours  left out: the colours beneath stay
    CMYK, YCbCr                 RGB by Pillow's formulas; colour profiles are not applied
    16-bit grey                 0..65535 (12-bit TIFF: 0..4095) to 0..255, or `pixel_range`
    32-bit integers, grey       0..65535 to 0..255, or `pixel_range`
    floating point, grey        0..1 to 0..255, or `pixel_range`
    16-bit colour or with alpha the high byte of every channel; refused with a `pixel_range`, which cannot be applied
    PGM, PPM                    scaled by the maximum in their header; beyond 8 bits, to 0..65535 before all else
    several pages or frames     the first
    EXIF orientation            applied
    =========================== ======================================================================================

    With a `pixel_range` what lies beyond it is clipped; without one such a file is refused, as its values have another
    meaning. Also refused: NaN and infinity, colour spaces that Pillow does not convert, more than `max_pixels`, and
    whatever is no regular file.

    Attributes:
        max_pixels: most pixels of an image, compared with the size in its header before anything is decoded.
        pixel_range: values that become black and white, or None for the range of the type.
    """

    max_pixels: int = MAX_PIXELS
    pixel_range: tuple[float, float] | None = None

    @classmethod
    def from_settings(cls, max_pixels: int, pixel_range: str) -> Self:
        """From ``--max-pixels`` and ``--pixel-range``; ValueError shows what is wrong with them."""
        if max_pixels < 1:
            raise ValueError(f"max_pixels must be at least 1, got {max_pixels}")
        if pixel_range == "auto":
            return cls(max_pixels)
        try:
            low, high = map(float, pixel_range.split(","))
        except ValueError:
            low = high = np.nan
        if not (np.isfinite(high - low) and low < high):
            raise ValueError(f"pixel_range must be auto or LOW,HIGH with LOW < HIGH, got {pixel_range!r}")
        return cls(max_pixels, (low, high))

    def read(self, path: Path, size: tuple[int, int] | None = None) -> Image.Image:
        """The image at `path`, upright, in one of Pillow's modes of 8 bits or 1.

        Args:
            size: width and height in which what is known of its pixels was written down. One that is stored in this
                size stays as it is stored, upright or not.

        Raises:
            OSError, ValueError: it cannot be read, is of another `size`, or is refused; the message does not name the
                file.
        """
        with _opened(path, self.max_pixels) as image:
            if self.pixel_range is not None and _loses_low_bytes(image):
                raise ValueError(
                    "a colour image of 16 bits per channel, of which only the high bytes can be read: pixel_range "
                    "cannot be applied; convert it to 8 bits"
                )
            stored = image.size
            if stored == size:
                image.load()  # here, as long as the file is open
            else:
                ImageOps.exif_transpose(image, in_place=True)
            if size not in (None, image.size):
                upright = f", upright {_by(image.size)}," if image.size != stored else ""
                raise ValueError(f"it has {_by(stored)} pixels{upright} and not {_by(size)}")
            image.info.pop("transparency", None)  # Pillow's conversions would warn of losing it
            return eight_bits(image, self.pixel_range)

    def highest_level(self, path: Path) -> int | None:
        """The highest value of a grey image whose white is 65535, None for other images; raises like ``read``."""
        with _opened(path, self.max_pixels) as image:
            sixteen = image.mode.startswith("I") and _type_range(image)[1] == 65535
            return int(np.asarray(image).max()) if sixteen else None


def drawn(total: int, count: int, seed: int) -> list[int]:
    """`count` of the numbers below `total` at random, all if there are no more, in their order."""
    return sorted(np.random.default_rng(seed).permutation(total)[:count].tolist())


def data_folder(root: str | Path, data: str) -> Path:
    """The folder `root` of the set that ``--data`` calls `data`; ValueError if there is none."""
    folder = Path(root)
    if not folder.is_dir():
        raise ValueError(
            f"data {data!r}: no folder {str(root)!r} (looked for {folder.absolute()}); name it with --data-root"
        )
    return folder


def read_levels(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The values ``[H, W]`` of a grey image or the numbers of a palette's, as the file has them.

    Returns:
        uint8 of images of 8 bits, integers of 16 or 32 bits of others.

    Raises:
        OSError, ValueError: it cannot be read, or has colours or floats; the message does not name the file.
    """
    with _opened(path, max_pixels) as image:
        if image.mode not in ("L", "P") and not image.mode.startswith("I"):
            raise ValueError(
                f"expected one value per pixel, integers of 8 or 16 bits, got an image of mode {image.mode}"
            )
        return np.asarray(image)


@contextlib.contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """The image file at `path`, its header read; OSError or ValueError for whatever happens in the block."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO would be waited for without end
        raise ValueError("not a regular file")
    try:
        with _pillow_limit(None):
            image = Image.open(path, formats=_FORMATS)
        # In the block, Pillow's own limit is for what a header says besides: the size of a TIFF's tiles.
        with image, _pillow_limit(max_pixels):
            width, height = image.size
            if width * height > max_pixels:
                raise ValueError(
                    f"{width} x {height} pixels, more than max_pixels {max_pixels:,}: too large, or made to fill memory"
                )
            yield image
    except Image.UnidentifiedImageError as e:
        # Pillow's own text ends in the file's path, which the caller names already.
        raise ValueError(f"not an image of a known format ({', '.join(_FORMATS)})") from e
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as e:  # damaged files make Pillow raise much: SyntaxError, TypeError, struct.error ...
        raise ValueError(str(e).strip() or type(e).__name__) from e


@contextlib.contextmanager
def _pillow_limit(pixels: int | None) -> Iterator[None]:
    """Pillow warns of more pixels than this and refuses more than twice as many; None for no limit.

    Its default, 89,478,485, would otherwise be the limit whatever the settings say.
    """
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _loses_low_bytes(image: Image.Image) -> bool:
    """Whether Pillow, which has no such mode, cuts an opened image's 16 bits per channel to 8."""
    return not image.mode.startswith("I") and ";16" in str(getattr(image, "tile", ())[:1])


def eight_bits(image: Image.Image, pixel_range: tuple[float, float] | None = None) -> Image.Image:
    """A grey image of integers or floats in mode ``L``, by the rules of ``Decoder``; others as they are.

    Raises:
        ValueError: a pixel is NaN or infinite, or beyond the type's range without a `pixel_range`.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    levels = np.asarray(image)
    low, high = pixel_range or _type_range(image)
    if levels.dtype.kind == "f" and not np.isfinite(levels).all():
        raise ValueError("a pixel is NaN or infinite")
    if pixel_range is None and not (low <= levels.min() and levels.max() <= high):
        raise ValueError(
            f"values from {levels.min():g} to {levels.max():g}, expected {low:g} to {high:g} in an image of "
            f"{'floats' if levels.dtype.kind == 'f' else 'integers'}: give the range with --pixel-range LOW,HIGH"
        )
    # White is zero, which Pillow sees to in images of 8 bits only.
    if _tags(image).get(ExifTags.Base.PhotometricInterpretation) == 0:
        low, high = high, low
    if levels.dtype.itemsize == 2:
        return Image.fromarray(_scaled(np.arange(2**16), low, high)[levels])
    return Image.fromarray(_scaled(levels, low, high))


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _type_range(image: Image.Image) -> tuple[float, float]:
    if image.mode == "F":
        return 0.0, 1.0
    bits = _tags(image).get(ExifTags.Base.BitsPerSample, (16,))[0]
    # Files of 32 bits mostly hold values of 16, and Pillow gives some files of 16 bits its mode of 32.
    return 0.0, 2.0 ** min(bits, 16) - 1


def _tags(image: Image.Image) -> Mapping[int, Any]:
    """A TIFF's tags, none of another file."""
    return getattr(image, "tag_v2", {})


def _scaled(levels: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8: `low` to 0, `high` to 255, rounded; in place, as an image may fill memory."""
    scaled = levels - np.float64(low)
    scaled *= 255 / (high - low)
    return np.rint(scaled, out=scaled).clip(0, 255, out=scaled).astype(np.uint8)
