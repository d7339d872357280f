"""Folders of images as tests need them, and what is said of the images in them."""

import os
import socket
import warnings

import numpy as np
from PIL import Image


def fill(folder, count=8, seed=0):
    """Colour pictures of 20 x 20 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def warned_of(run) -> tuple[object, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, [str(w.message) for w in caught if "cannot read" in str(w.message)]


def special_files(folder) -> dict[str, str]:
    """Files that are named like images and are none, with the reason that is given."""
    os.mkfifo(folder / "fifo.png")
    (folder / "to_fifo.png").symlink_to("fifo.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket.png"))  # a path of 108 bytes at most
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "itself.png").symlink_to("itself.png")
    no_file = dict.fromkeys(("fifo.png", "to_fifo.png", "socket.png", "device.png"), "not a regular file")
    return {**no_file, "dangling.png": "No such file or directory", "itself.png": "Too many levels of symbolic links"}


def sixteen_bits(folder, high):
    folder.mkdir(parents=True)
    for number in range(8):
        levels = np.random.default_rng(number).integers(0, high, (16, 16), dtype=np.uint16)
        levels[0, 0] = high
        Image.fromarray(levels).save(folder / f"{number}.png")
    return folder
