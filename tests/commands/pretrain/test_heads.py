import json

import pytest
import torch

from mimkernels import attention
from mimkernels.commands.pretrain.run import Run, pretrain
from mimkernels.engine import head_history
from mimkernels.engine.head_history import HeadHistory
from mimkernels.engine.training.heads import HeadWatch
from mimkernels.heads import HeadStatistics, plot_overview


def recorded(folder):
    return [json.loads(line) for line in (folder / "heads.jsonl").read_text().splitlines()]


def test_heads_are_recorded_every_so_many_steps_and_shown(tiny, tmp_path):
    config = tiny(head_stats="entropy,distance,prefix_mass", head_stats_every=4, epochs=2, output=str(tmp_path / "run"))
    result = pretrain(config)
    entries = recorded(tmp_path / "run")
    assert [entry["step"] for entry in entries] == [1, 4, 8]
    seen = HeadStatistics.from_dict(entries[-1]["heads"])
    assert set(seen.names) == {"entropy", "distance", "prefix_mass"}
    assert len(seen.layers) == config.model_kwargs["depth"]
    assert (seen.mean("prefix_mass") > 0).all() and (seen.mean("prefix_mass") < 1).all()
    assert "What the heads do" in result.report.read_text()


def test_a_run_without_head_statistics_has_no_section_of_them(tiny, tmp_path):
    result = pretrain(tiny(output=str(tmp_path / "run")))
    assert not (tmp_path / "run" / "heads.jsonl").exists()
    assert "What the heads do" not in result.report.read_text()


def test_recording_changes_no_result(tiny, tmp_path):
    plain = pretrain(tiny(output=str(tmp_path / "a")))
    watched = pretrain(tiny(output=str(tmp_path / "b"), head_stats="entropy", head_stats_every=2))
    losses = [
        [json.loads(line)["loss"] for line in (run.output / "metrics.jsonl").read_text().splitlines()]
        for run in (plain, watched)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_positive_weight_lowers_the_entropy(tiny, tmp_path):
    settings = {"head_stats": "entropy", "head_stats_every": 5, "epochs": 3, "lr": 3e-3}
    pretrain(tiny(**settings, output=str(tmp_path / "free")))
    pretrain(tiny(**settings, regularize={"entropy": 10.0}, output=str(tmp_path / "low")))
    free, low = (HeadStatistics.from_dict(recorded(tmp_path / name)[-1]["heads"]) for name in ("free", "low"))
    assert low.mean("entropy").mean() < free.mean("entropy").mean() - 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_stats": "entropi"}, "unknown statistic 'entropi'; known: entropy"),
        ({"head_stats": "nmi"}, "unknown statistic 'nmi'"),
        ({"regularize": {"peak": 1.0}}, "peak"),
        ({"regularize": {"distanc": 1.0}}, "distanc"),
        ({"head_stats_every": 0}, "head_stats_every must be at least 1, got 0"),
    ],
)
def test_refuses_before_anything_is_written(tiny, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Run(tiny(**changes, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_records_after_the_resumed_step_are_dropped(tiny, tmp_path):
    watch = HeadWatch(tiny(head_stats="entropy"), 1)
    assert watch.wanted(1) == ("entropy",) and watch.wanted(2) == ("entropy",)[:0]
    seen = HeadStatistics(quantities=["entropy"], num_prefix=1)
    history = HeadHistory(tmp_path, 0)
    for step in (1, 4, 8):
        history.add(step, seen)
    with (tmp_path / "heads.jsonl").open("a") as file:
        file.write('{"step": 9, "he')
    assert [entry["step"] for entry in HeadHistory(tmp_path, 4).entries] == [1, 4]


def test_both_pictures_of_heads_on_a_page_number_layers_from_one(tmp_path, monkeypatch):
    seen = HeadStatistics(quantities=["entropy"], num_prefix=1)
    for layer in range(2):
        q, k, v = torch.randn(3, 2, 2, 5, 8)
        seen.update(layer, attention(q, k, v, stats=seen.row_stats, num_prefix=1), q=q, k=k)
    history = HeadHistory(tmp_path, 0)
    history.add(1, seen)
    drawn = []
    monkeypatch.setattr(head_history, "plot_overview", lambda named: drawn.append(named) or plot_overview(named))
    assert history.picture().startswith("data:image/png")
    (shown,) = drawn[0].values()
    assert list(shown.layers) == [1, 2] and history.entries[0]["heads"]["layers"].keys() == {"0", "1"}
    torch.testing.assert_close(shown.mean("entropy"), seen.mean("entropy"), rtol=0, atol=0)


def test_a_run_continued_with_other_statistics_shows_those(tiny, tmp_path):
    output = str(tmp_path / "run")
    pretrain(tiny(head_stats="entropy", head_stats_every=1, epochs=1, output=output))
    config = tiny(head_stats="distance", head_stats_every=1, epochs=2, output=output)
    result = pretrain(config, resume="auto")
    entries = recorded(tmp_path / "run")
    assert [entry["heads"]["quantities"] for entry in entries] == [["entropy"]] * 5 + [["distance"]] * 5
    assert "What the heads do" in result.report.read_text()


def test_of_swin_the_mean_over_the_windows_of_an_image_counts(tiny, tmp_path):
    config = tiny(
        method="simmim", mask_unit=4, model="swin_tiny_patch4_window7_224", patch_size=2, batch_size=16, epochs=1,
        model_kwargs={"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        decoder_dim=512, decoder_depth=8, decoder_heads=16, head_stats="entropy", head_stats_every=1000,
    )  # fmt: skip
    run = Run(config)
    layers = [torch.rand(64, 2, 16), torch.rand(16, 2, 16)]  # 4 windows of an image, and one
    run.heads.wanted(1)
    run.heads.see([{"entropy": layer} for layer in layers])
    seen = run.heads.collect()
    assert seen.images == {0: 16, 1: 16}
    per_image = layers[0].mean(-1).unflatten(0, (16, 4)).mean(1)  # [16, H]
    torch.testing.assert_close(seen.std("entropy")[0], per_image.double().std(0), rtol=1e-5, atol=0)
