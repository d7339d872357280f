"""Pre-training on folders of images as they are found on disks."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from mimkernels.commands.pretrain.run import pretrain
from tests.data.folders import fill, sixteen_bits, special_files, warned_of

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


def test_another_range_makes_other_data_of_the_images(tiny, tmp_path):
    folder = sixteen_bits(tmp_path / "data", 40000)
    pretrain(tiny(data=str(folder), batch_size=8, pictures=0))
    with pytest.raises(ValueError, match="the data are not those of the checkpoint"):
        pretrain(tiny(data=str(folder), batch_size=8, epochs=2, pixel_range="0,40000"), resume="auto")
