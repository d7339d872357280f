"""Data of a run: Fashion-MNIST for training and probing, and what pixels are normalised by."""

import pytest

from mimkernels.commands.pretrain.run import Run, pretrain
from mimkernels.commands.probe.config import ProbeConfig
from mimkernels.commands.probe.run import probe
from mimkernels.data.sources import DigitsSource
from mimkernels.data.statistics import measure_statistics
from mimkernels.engine.checkpoint import load
from mimkernels.engine.encoder import load_encoder
from tests.commands.pretrain.test_run import losses, stop_after
from tests.data.test_fashion_mnist import write_set


@pytest.mark.parametrize("in_chans", [1, 3])
def test_fashion_mnist_is_trained_on_and_probed(tiny, tmp_path, in_chans):
    root = str(write_set(tmp_path / "root", count=60))
    config = tiny(data="fashion-mnist", data_root=root, img_size=28, in_chans=in_chans, batch_size=20, pictures=2)
    result = pretrain(config)
    assert result.content.run_facts["Data"] == "fashion-mnist, 60 images, 28 x 28 pixels"
    assert result.content.pictures_are_new and result.content.held_out_loss is not None
    saved = load(result.output / "checkpoints" / "final.pt")
    numbers = ",".join(["0.2860"] * in_chans) + "/" + ",".join(["0.3530"] * in_chans)
    assert saved["config"]["pixel_stats"] == numbers and saved["model_config"]["mean"] == [0.286] * in_chans
    probed = probe(
        ProbeConfig(
            model=str(result.output), data="fashion-mnist", data_root=root, pooling="mean", epochs=1, batch_size=20,
            knn=0, pictures=0, device="cpu", output=str(tmp_path / "probe"), workers=0,
        )
    )  # fmt: skip
    assert probed.test_images == 30


def test_statistics_of_the_data_are_measured_once(tiny, tmp_path, monkeypatch):
    (mean,), (std,) = measure_statistics(DigitsSource(), 1)
    settings = {"pixel_stats": "data", "save_every": 0.2}
    whole = pretrain(tiny(**settings, output=str(tmp_path / "whole"))).output
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert pretrain(tiny(**settings)).stopped_by
    monkeypatch.setattr("mimkernels.commands.pretrain.run.measure_statistics", lambda *a: pytest.fail("measured again"))
    run = Run(tiny(**settings), resume="auto")
    assert run.config.pixel_stats == f"{mean:.4f}/{std:.4f}" and run.model.std == (round(std, 4),)
    run.execute()
    assert losses(tmp_path / "run") == losses(whole)
    encoder = load_encoder(ProbeConfig(model=str(whole)))
    assert encoder._shift.item() == pytest.approx(255 * round(mean, 4))


def test_a_setting_that_is_no_statistics_is_refused(tiny):
    with pytest.raises(ValueError, match=r"in_chans 1, MEAN/STD with positive deviations, got '0.5,0.5/1,1'"):
        Run(tiny(pixel_stats="0.5,0.5/1,1"))
