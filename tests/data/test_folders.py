"""Folders of images as they are found on disks: links, special files, images that become nearly black."""

import os
import signal
import warnings

import numpy as np
import pytest
import torch

from mimkernels.data import sources
from mimkernels.data.batches import Augmentation, PretrainImages
from mimkernels.data.labelled import LabelledImages
from mimkernels.data.pixels import Decoder
from mimkernels.data.sources import FolderSource, open_source
from tests.data.folders import fill, sixteen_bits, special_files, warned_of


@pytest.fixture(autouse=True)
def deadline():
    """A read that waits for ever fails its test."""

    def too_late(*_):
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def classes(tmp_path):
    """Two class folders of eight pictures."""
    fill(tmp_path / "data" / "cats", seed=1)
    fill(tmp_path / "data" / "dogs", seed=2)
    return tmp_path / "data"


def test_what_is_no_regular_file_is_a_broken_image_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = fill(tmp_path / "images", 2)
    reasons = special_files(folder)
    source = FolderSource(folder)
    images = PretrainImages(source, Augmentation(16, 3, 1.0, False), seed=0)
    for index, name in enumerate(source.files):
        pixels, broken, _ = images[(0, index)]
        assert pixels is not None
        assert dict(broken).get(index) == reasons.get(name), name


def test_links_to_folders_that_they_lie_in_are_not_followed(classes):
    (classes / "cats" / "all").symlink_to(classes)
    (classes / "dogs" / "inner").mkdir()
    (classes / "dogs" / "inner" / "outer").symlink_to("../../dogs")
    (classes / "dogs" / "itself").symlink_to("itself")
    assert len(FolderSource(classes).files) == 16


def test_a_folder_without_permission_is_told_of(classes, monkeypatch):
    scandir = os.scandir

    def forbidden(place):
        if "dogs" in str(place):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(sources.os, "scandir", forbidden)

    source, told = warned_of(lambda: FolderSource(classes))
    assert len(source) == 8
    assert told == [f"cannot read the folder {classes / 'dogs'}, its images are left out: Permission denied"]


def test_class_folders_without_images_are_named_once(classes):
    for name in ("d", "e", ".hidden"):
        (classes / name).mkdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        names = [FolderSource(classes).targets()[1] for _ in range(3)]
    assert [str(w.message) for w in caught] == [f"{classes}: folders without images are no classes: 'd', 'e'"]
    assert all(known == sorted(p.name for p in classes.iterdir() if any(p.iterdir())) for known in names)


def test_images_that_become_nearly_black_are_told_of_with_their_range(tmp_path):
    folder = sixteen_bits(tmp_path / "twelve", 4000)
    with pytest.warns(UserWarning, match=r"twelve: .* reach 4000 of 65535 .* nearly black; .*--pixel-range 0,4095"):
        source = open_source(str(folder))
    assert np.asarray(source.read(0)).max() == 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = open_source(str(folder), decoder=Decoder.from_settings(10**6, "0,4000"))
        open_source(str(sixteen_bits(tmp_path / "sixteen", 65535)))
    assert np.asarray(source.read(0)).max() == 255


def test_other_pictures_of_the_same_sizes_are_other_images(tmp_path):
    """What is kept of the former ones is old; a link to nowhere has no time."""
    (tmp_path / "nowhere.png").symlink_to("there_is_none.png")
    fill(tmp_path, 2)
    images = LabelledImages(FolderSource(tmp_path), np.arange(3), torch.zeros(3, dtype=torch.int64))
    before, path = images.fingerprint(), tmp_path / "1.png"
    assert images.fingerprint() == before
    changed = path.stat().st_mtime_ns
    path.write_bytes(bytes(reversed(path.read_bytes())))
    os.utime(path, ns=(changed + 1, changed + 1))
    assert images.fingerprint() != before
