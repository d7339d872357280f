"""``pretrain --analyze-every``: the heads on the same images at several epochs."""

import io
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from mimkernels.commands.analyze.config import AnalyzeConfig
from mimkernels.commands.analyze.run import analyze
from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.run import pretrain
from mimkernels.data.batches import Augmentation
from mimkernels.data.sources import open_held_out, open_source
from mimkernels.engine.encoder import load_encoder
from mimkernels.engine.head_history import FIXED_IMAGES, QUANTITIES, Epochs, strips
from mimkernels.engine.model_names import ModelChoice
from mimkernels.engine.training.heads import FixedImages
from mimkernels.heads import HeadStatistics, capture
from mimkernels.models.build import build_model


def weights_of(folder):
    """What was trained: the newest checkpoint's weights."""
    newest = max((folder / "checkpoints").glob("*.pt"), key=lambda path: path.stat().st_mtime)
    return torch.load(newest, weights_only=True)["model"]


@pytest.fixture(scope="module")
def recorded(tiny_settings, tmp_path_factory):
    """A run of two epochs that recorded its heads twice in each."""
    folder = tmp_path_factory.mktemp("during") / "run"
    config = PretrainConfig(
        **{**tiny_settings, "epochs": 2, "analyze_every": 0.4, "save_every": 1, "output": str(folder)}
    )
    return pretrain(config), config, folder


def test_heads_are_recorded_from_the_untrained_encoder_to_the_last_step(recorded):
    result, _, folder = recorded
    entries = [json.loads(line) for line in (folder / FIXED_IMAGES).read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [0, 2, 4, 6, 8, 10]  # 5 steps an epoch
    epochs = Epochs.read(folder)
    assert epochs.epochs.tolist() == pytest.approx([0, 0.4, 0.8, 1.2, 1.6, 2])
    assert epochs.names == list(QUANTITIES) and epochs.by_layer("entropy").shape == (1, 6)
    assert all(set(seen.images.values()) == {64} for seen in epochs.seen)
    page = result.report.read_text()
    assert "How the heads change" in page and page.count("<svg") == 1 + 2 * len(QUANTITIES)


def test_what_is_recorded_last_is_what_the_finished_encoder_does(recorded):
    _, config, folder = recorded
    encoder = load_encoder(ModelChoice("run", str(folder)))
    source = open_held_out("digits", "data") or open_source("digits", "data")
    images = FixedImages(source, Augmentation(config.img_size, config.in_chans, 1.0, False)).images
    with capture(encoder.model, QUANTITIES, unit="pixel", accumulate=True) as heads:
        encoder(images)
    last = Epochs.read(folder).seen[-1]
    for name in QUANTITIES:
        torch.testing.assert_close(last.mean(name), heads.statistics.mean(name), rtol=1e-4, atol=1e-6)


def test_recording_changes_no_bit_of_training(recorded, tiny_settings, tmp_path):
    _, _, folder = recorded
    plain = pretrain(PretrainConfig(**{**tiny_settings, "epochs": 2, "output": str(tmp_path / "run")}))
    assert not (tmp_path / "run" / FIXED_IMAGES).exists()
    assert "How the heads change" not in plain.report.read_text()
    wanted, found = weights_of(tmp_path / "run"), weights_of(folder)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_a_run_that_is_continued_records_the_same(recorded, tmp_path):
    _, config, folder = recorded
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "final.pt").unlink()  # that of the first epoch stays
    result = pretrain(replace(config, output=str(tmp_path / "run")), resume="auto")
    assert result.step == 10
    assert (tmp_path / "run" / FIXED_IMAGES).read_text() == (folder / FIXED_IMAGES).read_text()


def test_analyze_shows_what_runs_recorded(recorded, tmp_path):
    _, _, folder = recorded
    small = {"images": 8, "viewer_images": 0, "device": "cpu", "workers": 0, "output": str(tmp_path / "out")}
    result = analyze(AnalyzeConfig([f"a={folder}"], during=True, **small), stream=io.StringIO())
    assert "During training" in result.report.read_text()
    (entries,) = result.numbers["during"].values()
    seen = [HeadStatistics.from_dict(entry["heads"]).layer_mean("entropy").item() for entry in entries]
    assert seen == pytest.approx(Epochs.read(folder).by_layer("entropy")[0].tolist())
    assert any(
        text.startswith("In training (epochs 0 to 2), the attention distance") for text in result.numbers["findings"]
    )
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns(FIXED_IMAGES))
    with pytest.raises(ValueError, match=r"none of .*bare is a run that recorded its heads \(during.jsonl"):
        analyze(AnalyzeConfig([str(bare)], during=True, **small), stream=io.StringIO())


@pytest.mark.parametrize("changes", [{"method": "simmim", "mask_unit": 8}, {"method": "supervised"}])
def test_every_method_is_recorded(tiny, tmp_path, changes):
    config = tiny(**changes)
    torch.manual_seed(0)
    model = build_model({**config.to_dict(), "num_classes": 10, "pixel_stats": "imagenet"}).eval()
    source = open_source("digits", "data")
    seen = FixedImages(source, Augmentation(16, 1, 1.0, False)).see(model, torch.device("cpu"))
    assert set(QUANTITIES) == set(seen.names)


@pytest.mark.parametrize("every", [-1.0, float("nan")])
def test_refuses_what_is_no_number_of_epochs(tiny, every):
    with pytest.raises(ValueError, match="analyze_every must be 0 or more and finite"):
        tiny(analyze_every=every).check()


def of_layers(*entropies, prefix=0):
    """Statistics of layers with one head of this entropy each."""
    seen = HeadStatistics(quantities=["entropy"], num_prefix=prefix)
    for layer, entropy in enumerate(entropies):
        seen.update(layer, {"entropy": torch.full((2, 1, 5), entropy)})
    return seen


def test_epochs_are_those_of_made_values():
    entries = [
        {"epoch": 4, "heads": of_layers(3.0, 1.0).to_dict()},
        {"epoch": 0, "heads": of_layers(2.0, 2.0).to_dict()},
    ]
    epochs = Epochs.of(entries)
    assert epochs.epochs.tolist() == [0, 4] and epochs.names == ["entropy"]
    assert epochs.by_layer("entropy").tolist() == [[2, 3], [2, 1]]  # layers by epochs
    first, last = epochs.quarters("entropy")
    assert first.tolist() == [2, 3] and last.tolist() == [2, 1]
    assert Epochs.of([]) is None
    (strip,) = strips({"a": epochs, "b": epochs})
    assert strip.title == "Entropy" and len(strip.panels) == 3
    words = re.findall("<!-- (.*?) -->", strip.maps[0])
    assert words[: words.index("epoch")] == ["0", "1", "2", "3", "4"]  # the columns reach from -2 to 6
