"""Folders of images as they are found on disks: links, special files, names that are no text, deep images."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.run import pretrain
from mimkernels.commands.probe.config import ProbeConfig
from mimkernels.commands.probe.data import open_split
from mimkernels.commands.probe.report import print_table
from mimkernels.commands.probe.run import PoolingResult, probe
from mimkernels.data import sources
from mimkernels.data.batches import Augmentation, PretrainImages
from mimkernels.data.pixels import Decoder
from mimkernels.data.sources import FolderSource, open_source
from mimkernels.engine.progress import Progress

NOT_UTF8 = os.fsdecode(b"caf\xe9")


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


def fill(folder, count=8, seed=0):
    """Colour pictures of 20 x 20 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def classes(tmp_path):
    """Two class folders of eight pictures."""
    fill(tmp_path / "data" / "cats", seed=1)
    fill(tmp_path / "data" / "dogs", seed=2)
    return tmp_path / "data"


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


def test_what_is_no_regular_file_is_a_broken_image_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = fill(tmp_path / "images", 2)
    reasons = special_files(folder)
    source = FolderSource(folder)
    images = PretrainImages(source, Augmentation(16, 3, 1.0, False), seed=0)
    for index, name in enumerate(source.files):
        pixels, broken = images[(0, index)]
        assert pixels is not None
        assert dict(broken).get(index) == reasons.get(name), name


@pytest.mark.parametrize("workers", [0, 1])
def test_training_on_a_folder_with_special_files_ends_and_names_them(tiny, tmp_path, monkeypatch, workers):
    monkeypatch.chdir(tmp_path)
    folder = fill(tmp_path / "images", 10)
    reasons = special_files(folder)
    config = tiny(data=str(folder), batch_size=8, epochs=2, in_chans=3, workers=workers, pictures=16)
    result, told = warned_of(lambda: pretrain(config))
    assert result.broken_images == len(told) == len(reasons)
    for name, reason in reasons.items():
        text = f"cannot read {folder / name}, another image takes its place: {reason}"
        assert any(one.startswith(text) for one in told), name
    assert "6 image files could not be read" in result.report.read_text()


def test_a_termination_of_the_whole_process_group_saves_and_exits_with_its_code(tmp_path):
    words = "--img-size 16 --in-chans 1 --patch-size 4 --model-kwargs embed_dim=16 depth=1 num_heads=2 --decoder-dim 16"
    words += " --decoder-depth 1 --decoder-heads 2 --batch-size 300 --epochs 9999 --workers 2 --device cpu"
    command = [sys.executable, "-m", "mimkernels", "pretrain", *words.split(), "--output", str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        end = time.monotonic() + 100
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end:
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)  # as `timeout` and job schedulers do
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "stopped at step" in out and "Traceback" not in err


def test_a_class_folder_that_is_a_link_to_another_class_is_a_class(classes):
    (classes / "wolves").symlink_to("dogs")
    numbers, names = FolderSource(classes).targets()
    assert names == ["cats", "dogs", "wolves"]
    assert np.bincount(numbers).tolist() == [8, 8, 8]
    split = open_split(ProbeConfig(model="m", data=str(classes)))
    assert split.classes == names and split.train.targets.bincount().tolist() == [6, 6, 6]


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
    result = PoolingResult("mean", "the mean", 0.5, None, None, 0, 34, 1.0, [])
    shown = io.BytesIO()
    stream = io.TextIOWrapper(shown, encoding="ascii")
    print_table([result], 100, stream)
    Progress(total_steps=1, steps_per_epoch=1, quiet=False, stream=stream).note(f"data {NOT_UTF8} é")
    assert rb"50.0 \xb1 5.0 %" in shown.getvalue() and rb"data caf\udce9 \xe9" in shown.getvalue()


def test_an_output_that_is_not_utf8_is_refused_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(ValueError, match="is not UTF-8"):
        pretrain(tiny(output=str(tmp_path / NOT_UTF8)))
    assert os.listdir(tmp_path) == []


def test_too_large_and_not_finite_images_are_named_and_replaced(tiny, tmp_path):
    folder = fill(tmp_path / "images")
    Image.new("L", (21, 20)).save(folder / "bomb.png")
    Image.fromarray(np.float32([[0, np.nan], [1, 0.5]])).save(folder / "nan.tif")
    Image.fromarray(np.float32([[0, 300], [1, 0.5]])).save(folder / "values.tif")
    config = tiny(data=str(folder), batch_size=11, epochs=1, in_chans=3, max_pixels=400)
    result, told = warned_of(lambda: pretrain(config))
    assert result.broken_images == 3
    reasons = {text.split(",")[0].removeprefix("cannot read "): text.partition("takes its place: ")[2] for text in told}
    assert reasons[str(folder / "bomb.png")].startswith("21 x 20 pixels, more than max_pixels 400")
    assert reasons[str(folder / "nan.tif")] == "a pixel is NaN or infinite"
    assert reasons[str(folder / "values.tif")].startswith("values from 0 to 300, expected 0 to 1")


def sixteen_bits(folder, high):
    folder.mkdir(parents=True)
    for number in range(8):
        levels = np.random.default_rng(number).integers(0, high, (16, 16), dtype=np.uint16)
        levels[0, 0] = high
        Image.fromarray(levels).save(folder / f"{number}.png")
    return folder


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


def test_another_range_makes_other_data_of_the_images(tiny, tmp_path):
    folder = sixteen_bits(tmp_path / "data", 40000)
    pretrain(tiny(data=str(folder), batch_size=8, pictures=0))
    with pytest.raises(ValueError, match="the data are not those of the checkpoint"):
        pretrain(tiny(data=str(folder), batch_size=8, epochs=2, pixel_range="0,40000"), resume="auto")


@pytest.mark.parametrize("change", [{"max_pixels": 0}, {"pixel_range": "4095"}, {"pixel_range": "2,1"}])
def test_settings_of_images_that_cannot_work_are_refused(tiny, change):
    name = next(iter(change))
    with pytest.raises(ValueError, match=name):
        tiny(**change).check()
    with pytest.raises(ValueError, match=name):
        ProbeConfig(model="m", **change).check()
