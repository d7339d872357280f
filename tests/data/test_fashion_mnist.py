"""Fashion-MNIST from idx files, statistics of pixels, and images that are held out."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from mimkernels.data import fashion_mnist
from mimkernels.data.batches import Augmentation
from mimkernels.data.sources import FolderSource, class_numbers, hold_out, open_held_out, open_source
from mimkernels.data.statistics import measure_statistics


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_set(folder, count=20, packed=True, seed=0):
    """A small set with the files of Fashion-MNIST."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for part, size in (("train", count), ("t10k", count // 2)):
        values = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8), np.arange(size, dtype=np.uint8) % 10
        for kind, content in zip(("images-idx3", "labels-idx1"), values, strict=True):
            data = idx(content)
            path = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(data) if packed else data)
    return folder


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(fashion_mnist, "_INSTALLED", tmp_path / "installed")


@pytest.mark.parametrize(
    ("inside", "packed"), [("", True), ("fashion-mnist", True), ("FashionMNIST/raw", False), ("../installed", True)]
)
def test_both_parts_are_read_where_they_are(tmp_path, inside, packed):
    write_set(tmp_path / "root" / inside, packed=packed)
    source, held_out = (
        open_source("fashion-mnist", str(tmp_path / "root")),
        open_held_out("fashion-mnist", tmp_path / "root"),
    )
    expected = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    assert (len(source), len(held_out)) == (20, 10)
    assert np.array_equal(source.read(3)[0], expected[3]) and source.read(3).dtype == torch.uint8
    numbers, names = source.targets()
    assert numbers == [i % 10 for i in range(20)] and names[9] == "Ankle boot" and len(names) == 10
    assert source.label(3) == "fashion-mnist train image 3"
    assert source.fingerprint().startswith("fashion-mnist/train/20/") != held_out.fingerprint()
    grey, colour = (Augmentation(32, channels, 1.0, False).plain(source.read(0)) for channels in (1, 3))
    assert torch.equal(colour, grey.expand(3, -1, -1))


def test_the_fingerprint_is_that_of_the_images(tmp_path):
    prints = [
        open_source("fashion-mnist", write_set(tmp_path / str(i), packed=packed, seed=seed)).fingerprint()
        for i, (packed, seed) in enumerate([(True, 0), (False, 0), (True, 1)])
    ]
    assert prints[0] == prints[1] != prints[2]


def test_the_refusal_says_where_to_get_the_files(tmp_path):
    told = r"no train-images-idx3-ubyte.gz in .*root.*installed; .*dataset-fashion-mnist.*--data-root.*:FashionMNIST"
    with pytest.raises(ValueError, match=told):
        open_source("fashion-mnist", tmp_path / "root")


@pytest.mark.parametrize("damage", ["cut", "other", "plain", "labels"])
def test_damaged_files_are_refused_by_name(tmp_path, damage):
    folder = write_set(tmp_path / "root")
    path = folder / "train-images-idx3-ubyte.gz"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "other":
        path.write_bytes(gzip.compress(b"nothing of the kind"))
    elif damage == "plain":
        path.write_bytes(b"not packed")
    else:
        (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(19, np.uint8))))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz"):
        open_source("fashion-mnist", folder)


def test_statistics_are_those_of_all_pixels(tmp_path):
    source = open_source("fashion-mnist", write_set(tmp_path / "root"))
    pixels = torch.stack([source.read(i) for i in range(20)]).double() / 255
    (mean,), (std,) = measure_statistics(source, 1)
    assert (mean, std) == pytest.approx((pixels.mean().item(), pixels.std(correction=0).item()), rel=1e-9)
    assert measure_statistics(source, 3) == (pytest.approx([mean] * 3), pytest.approx([std] * 3))


def test_statistics_of_colours_leave_broken_images_out(tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    (tmp_path / "0.png").write_bytes(b"broken")
    mean, std = measure_statistics(FolderSource(tmp_path), 3)
    assert mean == pytest.approx(pictures[1:].mean((0, 1, 2)) / 255)
    assert std == pytest.approx(pictures[1:].std((0, 1, 2)) / 255)


@pytest.mark.parametrize(("level", "message"), [(7, "same value in all pixels"), (None, "can be read")])
def test_data_without_statistics_are_refused(tmp_path, level, message):
    for number in range(3):
        path = tmp_path / f"{number}.png"
        path.write_bytes(b"broken") if level is None else Image.new("L", (4, 4), level).save(path)
    with pytest.raises(ValueError, match=message):
        measure_statistics(FolderSource(tmp_path), 1)


def test_a_share_is_held_out_whatever_the_order(tmp_path):
    source = open_source("fashion-mnist", write_set(tmp_path / "root"))
    train, val = hold_out(source, 0.25)
    assert (len(train), len(val)) == (15, 5)
    labels = [part.label(i) for part in (train, val) for i in range(len(part))]
    assert sorted(labels) == sorted(source.label(i) for i in range(20))
    assert train.targets()[0] == [source.targets()[0][i] for i in train.indices]
    assert len({part.fingerprint() for part in (source, train, val)}) == 3
    with pytest.raises(ValueError, match="has 1 image: none can be held out"):
        hold_out(hold_out(train, 0.01)[1], 0.5)
    for folder in ("a", "b"):  # where a folder lies does not matter
        (tmp_path / folder).mkdir()
        for number in range(9):
            Image.new("L", (2, 2), number).save(tmp_path / folder / f"{number}.png")
    chosen = [[one.label(i)[-5:] for i in range(len(one))]
              for one in (hold_out(FolderSource(tmp_path / folder), 0.3)[1] for folder in ("a", "b"))]  # fmt: skip
    assert chosen[0] == chosen[1] and len(chosen[0]) == 3


def test_classes_of_other_images_get_the_numbers_of_the_first(tmp_path):
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
        Image.new("L", (2, 2)).save(tmp_path / name / "0.png")
    assert class_numbers(FolderSource(tmp_path), "train", ["a", "b", "c"]) == [1, 2]
    with pytest.raises(ValueError, match="has a class 'c' that 'train' has not; it has a, b"):
        class_numbers(FolderSource(tmp_path), "train", ["a", "b"])
