"""What becomes of the pixels of an image file, by exact values."""

import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from mimkernels.data.batches import to_pixels
from mimkernels.data.pixels import Decoder

ORIENTATION = 0x0112


@pytest.fixture
def decoded(tmp_path):
    """Pixels ``[H, W, 3]`` or ``[H, W]`` of levels or an image, saved as a file and read again."""

    def decode(content, name="x.png", channels=1, decoder=None, **options):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            image = content if isinstance(content, Image.Image) else Image.fromarray(content)
            image.save(tmp_path / name, **options)
        image = (decoder or Decoder()).read(tmp_path / name)
        pixels = to_pixels(image, channels).permute(1, 2, 0).numpy()
        return pixels[..., 0] if channels == 1 else pixels

    return decode


def twelve_bit_tiff(levels: np.ndarray) -> bytes:
    """A TIFF of ``[H, W]`` levels, two of which share three bytes."""
    height, width = levels.shape
    bits = "".join(f"{level:012b}" for level in levels.ravel())
    strip = int(bits, 2).to_bytes(len(bits) // 8, "big")
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_sixteen_bits_become_eight_by_the_range_of_the_type_not_of_the_image(decoded, name):
    levels = np.array([[0, 128, 257, 4095, 32896, 40000]], np.uint16)
    assert decoded(levels, name).tolist() == [[0, 0, 1, 16, 128, 156]]
    assert decoded(levels[:, :3], name).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_the_range_of_twelve_bits_in_files_of_sixteen_is_given(decoded, name):
    levels = np.array([[0, 8, 9, 2048, 4095, 5000]], np.uint16)
    twelve = Decoder.from_settings(10**6, "0,4095")
    assert decoded(levels, name, decoder=twelve).tolist() == [[0, 0, 1, 128, 255, 255]]


def test_a_file_of_twelve_bits_says_so_itself(decoded):
    levels = np.array([[0, 16], [2048, 4095]])
    assert decoded(twelve_bit_tiff(levels), "x.tif").tolist() == [[0, 1], [128, 255]]


@pytest.mark.parametrize("maximum", [255, 4095, 65535])
def test_a_netpbm_file_is_scaled_by_the_maximum_in_its_header(decoded, maximum):
    levels = np.array([0, maximum // 2 + 1, maximum], "u1" if maximum < 256 else ">u2")
    assert decoded(b"P5 3 1 %d " % maximum + levels.tobytes(), "x.pgm").tolist() == [[0, 128, 255]]


def test_byte_order_and_compression_change_nothing(decoded):
    levels = np.array([[0, 257, 32896, 65535]], np.uint16)
    big_endian = Image.frombytes("I;16B", (4, 1), levels.astype(">u2").tobytes())
    for image, options in ((big_endian, {}), (levels, {"compression": "tiff_lzw"})):
        assert decoded(image, "x.tif", **options).tolist() == [[0, 1, 128, 255]]
    floats = np.float32([[0, 0.5, 1]])
    assert decoded(floats, "x.tif", compression="tiff_lzw").tolist() == [[0, 128, 255]]


def test_floats_are_read_by_one_range_for_all_images(decoded):
    assert decoded(np.float32([[0, 0.25, 0.5, 1]]), "x.tif").tolist() == [[0, 64, 128, 255]]
    assert decoded(np.float32([[0, 0.25, 0.5]]), "x.tif").tolist() == [[0, 64, 128]]
    hounsfield = Decoder.from_settings(10**6, "-1000,1000")
    assert decoded(np.float32([[-2000, -1000, 0, 1000]]), "x.tif", decoder=hounsfield).tolist() == [[0, 0, 128, 255]]


def test_integers_of_32_bits_are_read_by_one_range_for_all_images(decoded):
    assert decoded(np.int32([[0, 257, 65535]]), "x.tif").tolist() == [[0, 1, 255]]
    window = Decoder.from_settings(10**6, "-100,155")
    assert decoded(np.int32([[-200, -100, 0, 155]]), "x.tif", decoder=window).tolist() == [[0, 0, 100, 255]]


@pytest.mark.parametrize("levels", [np.float32([[0, 255]]), np.float32([[-0.1, 1]]), np.int32([[0, 65536]])])
def test_values_beyond_the_range_of_the_type_are_refused_with_their_range(decoded, levels):
    low, high = levels.min(), levels.max()
    with pytest.raises(ValueError, match=rf"values from {low:g} to {high:g}, expected 0 to .*--pixel-range LOW,HIGH"):
        decoded(levels, "x.tif")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("pixel_range", ["auto", "0,1"])
def test_one_pixel_that_is_not_finite_refuses_the_image(decoded, value, pixel_range):
    with pytest.raises(ValueError, match="a pixel is NaN or infinite"):
        decoded(np.float32([[0, 0.5, value]]), "x.tif", decoder=Decoder.from_settings(10**6, pixel_range))


def test_white_may_be_zero(decoded, tmp_path):
    Image.fromarray(np.array([[0, 65535, 257]], np.uint16)).save(tmp_path / "black.tif")
    content = (tmp_path / "black.tif").read_bytes()
    black_is_zero, white_is_zero = (struct.pack("<HHIHH", 262, 3, 1, kind, 0) for kind in (1, 0))
    assert content.count(black_is_zero) == 1
    assert decoded(content.replace(black_is_zero, white_is_zero), "x.tif").tolist() == [[255, 0, 254]]


def test_colour_of_sixteen_bits_gives_its_high_bytes_and_no_range_can_be_applied(decoded):
    # Pillow writes none: 2 x 1 pixels, as raw PPM.
    content = b"P6 2 1 65535 " + np.array([0, 257, 65535, 1000, 2000, 3000], ">u2").tobytes()
    assert decoded(content, "x.ppm", channels=3).tolist() == [[[0, 1, 255], [4, 8, 12]]]
    content = png(np.array([[[0, 0x12FF, 0xFFFF], [0x0FFF, 0x00FF, 0x0100]]], ">u2"))
    assert decoded(content, channels=3).tolist() == [[[0, 0x12, 0xFF], [0x0F, 0, 1]]]
    with pytest.raises(ValueError, match="16 bits per channel.*pixel_range cannot be applied"):
        decoded(content, decoder=Decoder.from_settings(10**6, "0,4095"))


def png(levels: np.ndarray) -> bytes:
    """``[H, W, 3]`` of 16 bits as a PNG."""
    import zlib

    height, width, _ = levels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in levels)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in [*chunks, (b"IEND", b"")]
    )


def test_eight_bits_stay_as_they_are_whatever_the_range(decoded):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for decoder in (Decoder(), Decoder.from_settings(10**6, "0,4095")):
        assert np.array_equal(decoded(levels, decoder=decoder), levels)
    colour = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    assert np.array_equal(decoded(colour, channels=3), colour)


def test_one_bit_palette_and_alpha(decoded):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's, of transparency that is lost
        assert decoded(Image.fromarray(np.array([[True, False]]))).tolist() == [[255, 0]]
        indexed = Image.fromarray(np.array([[0, 1]], np.uint8))
        indexed.putpalette([10, 20, 30, 200, 100, 50])
        for options in ({}, {"transparency": b"\x00\x80"}):
            assert decoded(indexed, channels=3, **options).tolist() == [[[10, 20, 30], [200, 100, 50]]]
        clear = np.array([[[10, 20, 30, 0], [200, 100, 50, 255]]], np.uint8)
        assert decoded(clear, channels=3).tolist() == [[[10, 20, 30], [200, 100, 50]]]
        assert decoded(clear[..., 2:]).tolist() == [[30, 50]]  # LA
    cmyk = Image.fromarray(np.array([[[255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8), mode="CMYK")
    assert decoded(cmyk, "x.tif", channels=3).tolist() == [[[0, 255, 255], [0, 0, 0]]]


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(decoded, name, orientation):
    levels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 50
    colour = np.stack([levels] * 3, 2)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    upright = {
        1: colour, 2: colour[:, ::-1], 3: colour[::-1, ::-1], 4: colour[::-1], 5: colour.swapaxes(0, 1),
        6: colour[::-1].swapaxes(0, 1), 7: colour[::-1, ::-1].swapaxes(0, 1), 8: colour[:, ::-1].swapaxes(0, 1),
    }[orientation]  # fmt: skip
    options = {"lossless": True} if name == "x.webp" else {}
    assert np.array_equal(decoded(colour, name, channels=3, exif=exif, **options), upright)


def test_a_photograph_taken_upright_is_read_upright(decoded):
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was turned: the right edge of the file is the bottom
    lying = np.zeros((16, 32), np.uint8)
    lying[:, 16:] = 255
    pixels = decoded(lying, "x.jpg", exif=exif)
    assert pixels.shape == (32, 16) and pixels[:15].max() < 20 and pixels[17:].min() > 235


def test_the_size_in_the_header_is_compared_before_anything_is_decoded(tmp_path):
    Image.new("L", (300, 200)).save(tmp_path / "x.png")
    assert Decoder(max_pixels=60_000).read(tmp_path / "x.png").size == (300, 200)
    content = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(content[:50])  # little more than the header: decoding would fail
    with pytest.raises(ValueError, match="300 x 200 pixels, more than max_pixels 59,999"):
        Decoder(max_pixels=59_999).read(tmp_path / "x.png")


def test_the_limit_of_pillow_is_neither_changed_nor_met(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("L", (300, 200)).save(tmp_path / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Decoder().read(tmp_path / "x.png")
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_a_decompression_bomb_costs_no_memory(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("L", (13000, 13000)).save(path)
    assert path.stat().st_size < 2**20
    code = (
        "import resource, sys; from pathlib import Path; from mimkernels.data.pixels import Decoder\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: Decoder().read(Path(sys.argv[1]))\n"
        "except ValueError as e: print(e)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    refusal, kilobytes = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "13000 x 13000 pixels, more than max_pixels 100,000,000" in refusal
    assert int(kilobytes) < 16 * 1024


@pytest.mark.parametrize("value", ["", "1", "1,0", "0,0", "0,nan", "-inf,0", "a,b", "0,1,2"])
def test_a_range_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="pixel_range must be auto or LOW,HIGH with LOW < HIGH, got"):
        Decoder.from_settings(1, value)


def test_only_the_formats_of_image_folders_are_opened(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "x.ico")
    (tmp_path / "x.ico").rename(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"not an image of a known format \(JPEG, PNG"):
        Decoder().read(tmp_path / "x.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of metadata
def test_whatever_damage_is_an_error_that_readers_of_images_expect(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010F] = 6, "maker"
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
    for name in ("x.jpg", "x.png", "x.tif", "x.gif", "x.webp", "x.bmp"):
        Image.fromarray(colour).save(tmp_path / name, exif=exif)
        content = (tmp_path / name).read_bytes()
        for _ in range(300):
            damaged = bytearray(content)
            for place in rng.integers(0, min(len(content), 300), 3):
                damaged[place] = rng.integers(256)
            (tmp_path / name).write_bytes(damaged)
            try:
                Decoder(max_pixels=10**6).read(tmp_path / name)
            except (OSError, ValueError) as e:
                assert not isinstance(e, UnicodeError)
