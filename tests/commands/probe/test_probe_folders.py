"""Probing on folders of images as they are found on disks, with encoders that were trained on them."""

import io
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.run import pretrain
from mimkernels.commands.probe.config import ProbeConfig
from mimkernels.commands.probe.report import print_results
from mimkernels.commands.probe.results import PoolingResult
from mimkernels.commands.probe.run import probe
from mimkernels.data.labelled import LabelledImages
from mimkernels.data.sources import FolderSource
from mimkernels.data.split import open_split
from mimkernels.engine.progress import Progress
from tests.data.folders import fill, sixteen_bits, warned_of

NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.fixture
def classes(tmp_path):
    """Two class folders of eight pictures."""
    fill(tmp_path / "data" / "cats", seed=1)
    fill(tmp_path / "data" / "dogs", seed=2)
    return tmp_path / "data"


def test_a_class_folder_that_is_a_link_to_another_class_is_a_class(classes):
    (classes / "wolves").symlink_to("dogs")
    numbers, names = FolderSource(classes).targets()
    assert names == ["cats", "dogs", "wolves"]
    assert np.bincount(numbers).tolist() == [8, 8, 8]
    split = open_split(ProbeConfig(model="m", data=str(classes)))
    assert split.classes == names and split.train.targets.bincount().tolist() == [6, 6, 6]


def test_a_path_that_is_not_utf8_is_trained_on_resumed_probed_and_reported(tiny, tmp_path):
    data = tmp_path / NOT_UTF8
    fill(data / NOT_UTF8, seed=1)
    fill(data / "b", seed=2)
    (data / NOT_UTF8 / "0.png").write_text("no picture")
    config = tiny(data=str(data), batch_size=8, epochs=1, in_chans=3)
    shown = rf"{tmp_path}/caf\udce9"
    with open(tmp_path / "log", "w", encoding="utf-8") as stream:
        result, told = warned_of(lambda: pretrain(config, stream=stream))
        assert told[0].startswith(f"cannot read {data}/{NOT_UTF8}/0.png")
        assert pretrain(PretrainConfig.load(tmp_path / "run" / "config.json"), resume="auto", stream=stream).step == 2
        settings = ProbeConfig(
            model=str(tmp_path / "run"),
            data=str(data),
            output=str(tmp_path / "probe"),
            pooling="cls,abmilp",
            batch_size=4,
            epochs=1,
            device="cpu",
            workers=0,
            pictures=2,
        )
        with pytest.warns(UserWarning, match="cannot be read.*0.png"):
            probed = probe(settings, stream=stream)
    assert f"Data       {shown}, 16 images" in (tmp_path / "log").read_text()
    for page in (result.report, probed.report):
        assert shown in page.read_text(encoding="utf-8")
    assert r">caf\udce9</th>" in probed.report.read_text()  # a class


def test_a_stream_that_cannot_show_a_sign_gets_its_escape():
    result = PoolingResult("mean", "the mean", 0.5, 100, None, None, 0, 34, 1.0, [])
    shown = io.BytesIO()
    stream = io.TextIOWrapper(shown, encoding="ascii")
    print_results([result], stream)
    Progress(total_steps=1, steps_per_epoch=1, quiet=False, stream=stream).note(f"data {NOT_UTF8} é")
    assert rb"50.0 \xb1 5.0 %" in shown.getvalue() and rb"data caf\udce9 \xe9" in shown.getvalue()


def test_a_probe_reads_images_by_the_range_that_its_encoder_was_trained_with(tiny, tmp_path):
    for kind in "ab":
        sixteen_bits(tmp_path / "data" / kind, 4000)
    pretrain(tiny(data=str(tmp_path / "data"), batch_size=8, pixel_range="0,4000", pictures=0))
    settings = {
        "model": str(tmp_path / "run"), "data": str(tmp_path / "data"), "output": str(tmp_path / "probe"),
        "pooling": "cls", "batch_size": 4, "epochs": 1, "device": "cpu", "workers": 0, "pictures": 0,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing becomes nearly black
        probe(ProbeConfig(**settings))
        probe(ProbeConfig(**settings, pixel_range="0,4000"))  # the same, and therefore kept
    with pytest.raises(ValueError, match="different: training images, test images"):
        probe(ProbeConfig(**settings, pixel_range="0,5000"))


@pytest.mark.parametrize("change", [{"max_pixels": 0}, {"pixel_range": "4095"}, {"pixel_range": "2,1"}])
def test_settings_of_images_that_cannot_work_are_refused(tiny, change):
    name = next(iter(change))
    with pytest.raises(ValueError, match=name):
        tiny(**change).check()
    with pytest.raises(ValueError, match=name):
        ProbeConfig(model="m", **change).check()


def test_images_replaced_under_their_names_are_another_probe(tmp_path):
    for number, name in enumerate("ab"):
        fill(tmp_path / name, count=3, seed=number)
    source = FolderSource(tmp_path)
    images = LabelledImages(source, np.arange(4), torch.zeros(4, dtype=torch.int64))
    before = images.fingerprint()
    (tmp_path / "b" / "2.png").write_bytes(b"not among these four")
    assert images.fingerprint() == before
    Image.new("RGB", (20, 20)).save(tmp_path / "a" / "1.png")
    assert images.fingerprint() != before
    (tmp_path / "b" / "0.png").unlink()  # is told when it is read
    assert images.fingerprint() != before
