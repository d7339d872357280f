"""The benchmark command: what it compares, what it draws. No time is asserted."""

import functools
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from mimkernels.cli import main
from mimkernels.commands.bench import run as bench_run
from mimkernels.commands.bench.cases import scaling
from mimkernels.commands.bench.cases.gathering import Size
from mimkernels.commands.bench.cases.loading import MEAN, STD, Pictures
from mimkernels.commands.bench.cases.masks import mask_cases
from mimkernels.commands.bench.compare import FLOOR, compare
from mimkernels.commands.bench.tables import all_tables
from mimkernels.commands.bench.timing import Benchmark, measure


def record(name="gather", factor=1.0, jitter=0.01, seed=0, **further):
    noise = torch.randn(10, generator=torch.Generator().manual_seed(seed)) * jitter
    return {
        "name": name, "shape": "B=1", "dtype": "float32",
        "median_us": {"ours": 100.0 * factor, "plain": 200.0}, "relative": [0.5 * factor * math.exp(n) for n in noise],
        "moved_bytes": None, "flops": None, **further,
    }  # fmt: skip


def save(folder, *records):
    folder.mkdir()
    (folder / "gathering-float32.json").write_text(json.dumps({"machine": {}, "results": list(records)}))
    return str(folder)


def test_compare_catches_a_slowdown_of_a_tenth(tmp_path, capsys):
    before = save(tmp_path / "before", record(), record("loss"))
    after = save(tmp_path / "after", record(factor=1.1, seed=1), record("loss", seed=2))
    assert main(["bench", "compare", before, after]) == 1
    shown = capsys.readouterr().out
    slower = [line for line in shown.splitlines() if "SLOWER" in line]
    assert len(slower) == 1 and slower[0].startswith("gather, B=1, float32") and "2 cases, 1 slower" in shown


def test_compare_is_quiet_where_nothing_changed(tmp_path, capsys):
    runs = [save(tmp_path / str(i), *(record(str(j), seed=100 * i + j) for j in range(50))) for i in range(2)]
    assert main(["bench", "compare", *runs]) == 0
    assert "50 cases, 0 slower" in capsys.readouterr().out


def test_runs_that_differ_among_themselves_make_noise():
    def runs(*factors):
        return {"gather": [record(factor=factor, seed=seed) for seed, factor in enumerate(factors)]}

    (steady,) = compare(runs(1.0, 1.01, 0.99, 1.0), runs(1.1, 1.11, 1.09, 1.1))
    assert steady.verdict == "SLOWER" and steady.noise < 0.1
    (restless,) = compare(runs(1.0, 1.2, 0.9, 1.1), runs(1.1, 1.3, 1.0, 1.2))
    assert restless.verdict == "too noisy to tell"


def test_compare_says_where_the_noise_hides_a_tenth(tmp_path, capsys):
    runs = [save(tmp_path / str(i), record(jitter=0.3, seed=i)) for i in range(2)]
    assert main(["bench", "compare", *runs]) == 0
    assert "too noisy to tell" in capsys.readouterr().out


def test_compare_measures_against_what_is_not_ours():
    # The machine is twice as slow, for all versions alike: no regression.
    slow = record(seed=1)
    slow["median_us"] = {name: 2 * value for name, value in slow["median_us"].items()}
    (change,) = compare({"gather": [record()]}, {"gather": [slow]})
    assert abs(change.change) < FLOOR and change.after_us == 2 * change.before_us


def test_compare_refuses_what_cannot_be_compared(tmp_path, capsys):
    some, other = save(tmp_path / "a", record("gather")), save(tmp_path / "b", record("loss"))
    assert main(["bench", "compare", some, other]) == 2
    assert "gather, B=1, float32 before, loss, B=1, float32 after" in capsys.readouterr().err
    assert main(["bench", "compare", some, "no-such-folder"]) == 2
    assert "there is no 'no-such-folder'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "Expecting property name"),
        ("null", "expected an object, found missing"),
        ("[]", "expected an object, found a list"),
        ('{"results": []}', "machine is missing"),
        ('{"machine": {}, "results": {"a": 1}}', "results is an object"),
        ('{"machine": {}, "results": [1]}', "result 0 is a number"),
        ('{"machine": {}, "results": [{"name": "gather"}]}', "result 0 has shape missing"),
    ],
)
def test_malformed_results_are_refused_by_name(text, what, tmp_path, capsys):
    (tmp_path / "broken.json").write_text(text)
    for words in (["compare", str(tmp_path), str(tmp_path)], ["plot", str(tmp_path)]):
        assert main(["bench", *words]) == 2
        refusal = capsys.readouterr().err
        assert f"bench {words[0]}: " in refusal and f"broken.json' holds no results of a run: {what}" in refusal


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--seconds", "-1"], "--seconds must be positive, got -1.0"),
        (["--group", "calls", "--only", "nothing such"], "no case of calls has 'nothing such' in its name"),
    ],
)
def test_run_refuses_what_measures_nothing(words, what, capsys):
    assert main(["bench", "run", *words]) == 2
    assert f"mimkernels bench run: {what}" in capsys.readouterr().err


def test_a_measurement_is_recorded_in_blocks():
    versions = {"ours": lambda: None, "plain": lambda: None}
    timing = measure(Benchmark(name="nothing", shape="", versions=versions), "cpu", "float32", seconds=1e-3)
    assert timing.rounds >= 7 and 5 <= len(timing.relative) <= 10
    assert json.loads(json.dumps(timing.record()))["relative"]


def test_versions_that_disagree_are_not_timed():
    def refuse():
        raise AssertionError("the versions differ")

    benchmark = Benchmark(name="wrong", shape="", versions={"ours": lambda: None}, check=refuse)
    with pytest.raises(AssertionError, match="the versions differ"):
        measure(benchmark, "cpu", "float32")


def test_a_stopped_run_keeps_the_cases_it_measured(tmp_path, monkeypatch, capsys):
    measured = []

    def measure_one(*arguments):
        if measured:
            raise KeyboardInterrupt
        measured.append(measure(*arguments))
        return measured[0]

    run = [
        "bench",
        "run",
        "--seconds",
        "0.001",
        "--batch",
        "1",
        "--no-compile",
        "--group",
        "gathering",
        "--only",
        "gather",
    ]
    with monkeypatch.context() as patched:
        patched.setattr(bench_run, "measure", measure_one)
        assert main([*run, "--output", str(tmp_path / "stopped")]) == 130
    (file,) = (tmp_path / "stopped").iterdir()
    report = json.loads(file.read_text())
    assert file.name == "gathering-float32.json" and report["complete"] is False
    assert [record["name"] for record in report["results"]] == [measured[0].name]
    assert main([*run, "--output", str(tmp_path / "whole")]) == 0
    whole = json.loads((tmp_path / "whole" / "gathering-float32.json").read_text())
    assert whole["complete"] is True and len(whole["results"]) > 1
    capsys.readouterr()
    assert main(["bench", "compare", str(tmp_path / "stopped"), str(tmp_path / "whole")]) in (0, 1)
    shown = capsys.readouterr()
    assert "1 cases" in shown.out and f"incomplete, the run was stopped: {file} (1 cases)" in shown.err
    assert main(["bench", "plot", str(tmp_path / "stopped")]) == 0
    note = "incomplete, the run was stopped: gathering-float32 (1 cases)"
    assert note in capsys.readouterr().err
    assert all(note in (tmp_path / "stopped" / name).read_text() for name in ("tables.md", "report.html"))
    # The group run again replaces what was stopped.
    assert main([*run, "--output", str(tmp_path / "stopped")]) == 0
    assert json.loads(file.read_text())["complete"] is True


def test_run_then_plot(tmp_path, capsys, monkeypatch):
    # Images of 112 pixels, few rows, 3 rounds: what runs is the same, and takes seconds of larger ones.
    monkeypatch.setattr("mimkernels.commands.bench.timing._LONG", 0.0)
    monkeypatch.setattr("mimkernels.commands.bench.cases.mlp.SHAPES", ((49, 512), (98, 768)))
    monkeypatch.setattr("mimkernels.commands.bench.cases.norm.SHAPES", ((1, 49, 512), (2, 49, 768)))
    monkeypatch.setattr(bench_run, "Size", functools.partial(Size, tokens=49, keep=12))
    run = ["bench", "run", "--seconds", "0.001", "--batch", "1", "--no-compile", "--output", str(tmp_path)]
    assert main([*run, "--group", "gathering", "pooling", "mlp", "norm", "calls"]) == 0
    shown = capsys.readouterr().out
    assert (
        "restore_tokens + positions" in shown
        and "query_pool, AbMILP, forward" in shown
        and "add_layer_norm, forward + backward" in shown
        and "call of attention" in shown
    )
    assert main(["bench", "plot", str(tmp_path)]) == 0
    written = {line.rpartition("/")[2] for line in capsys.readouterr().out.split()}
    assert written == {"speedups.png", "limits.png", "roofline.png", "tables.md", "report.html"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "http" not in page


def test_a_run_prints_its_rows_alone():
    run = ["bench", "run", "--group", "gathering", "--only", "restore_tokens", "--seconds", "0.001", "--batch", "1"]
    done = subprocess.run([sys.executable, "-m", "mimkernels", *run, "--no-compile"], capture_output=True, text=True)
    assert done.returncode == 0 and "restore_tokens" in done.stdout
    assert "Profiler" not in done.stdout + done.stderr  # its lines, one for each version of a case


def test_tables_state_what_was_measured():
    about = {"device": "A processor", "threads": 2, "cpu_isa": "avx2", "torch": "2.14"}
    gather = record(
        median_us={"ours": 100.0, "plain": 250.0, "compiled": 120.0},
        share_of_copy_bandwidth=0.8, peak_bytes={"ours": 10, "plain": 40},
    )  # fmt: skip
    step = record(
        "MAE step", images=8, median_us={"ours": 2e6, "plain": 4e6},
        breakdown_ms={"ours": {"GEMM": 1.0, "loss": 500.0, "optimizer": 20.0}, "plain": {"GEMM": 1.0, "loss": 900.0}},
    )  # fmt: skip
    reports = {"gathering-float32": {"machine": about, "results": [gather]},
               "step-float32": {"machine": about, "results": [step]}}  # fmt: skip
    text = all_tables(reports)
    assert text.startswith("**A processor, 2 threads (avx2)**")
    assert "| gather | 2.5 | 1.2 | 80% | 25% |" in text
    assert "| MAE step, B=1, float32 | 4.00 | 2.00 | 2.00 | 0.52, 0.90 |" in text


def test_a_step_loads_the_same_pictures_on_both_sides():
    with Pictures() as pictures:
        ours, published = next(pictures.trainer(2, workers=0)), next(pictures.published(2, workers=0))
    assert ours.dtype == torch.uint8 and ours.shape == published.shape == (2, 3, 224, 224)
    normal = (ours / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    # Other pictures and crops, one distribution.
    assert abs(normal.mean() - published.mean()) < 0.2 and abs(normal.std() - published.std()) < 0.2


def test_a_batch_of_any_size_takes_as_many_images(monkeypatch):
    monkeypatch.setattr(scaling, "IMAGES", 4)
    monkeypatch.setattr(scaling, "BATCHES", (1, 4))
    cases = list(itertools.islice(scaling.scaling_cases(torch.float32, "cpu"), 2))
    assert [case.shape.split()[0] for case in cases] == ["B=1", "B=4"]
    assert cases[0].moved_bytes == cases[1].moved_bytes and cases[0].details() == {"images": 4}
    for case in cases:
        case.check()
        case.versions["ours"]()


def test_the_published_masks_are_as_large_as_ours():
    (case,) = mask_cases()
    case.check()
    ours, theirs = (np.concatenate([draw() for _ in range(4)]) for draw in case.versions.values())
    assert abs(ours.mean(0) - theirs.mean(0)).max() < 6 * 0.5 * (2 / len(ours)) ** 0.5


def test_plot_without_results_says_what_makes_some(tmp_path, capsys):
    assert main(["bench", "plot", str(tmp_path)]) == 2
    assert "mimkernels bench run" in capsys.readouterr().err


def test_the_published_step_is_ours():
    from mimkernels.commands.bench.cases.step import KINDS, Step, breakdown, step_case

    for stats in (False, True):
        case = step_case(Step("vit_tiny_patch16_224", batch=1), stats=stats)
        case.check()
        case.versions["plain"]()
        parts = breakdown(case.versions["ours"], "cpu", steps=1)
        assert set(parts) == set(KINDS) and all(parts[kind] > 0 for kind in KINDS)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("beit_base_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}),
        ("swin_base_patch4_window7_224", {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2),
                                          "window_size": 8}),
    ],
)  # fmt: skip
def test_the_published_step_of_simmim_is_ours(model, options):
    from mimkernels.commands.bench.cases.simmim import simmim_case
    from mimkernels.commands.bench.cases.step import KINDS, Step

    case = simmim_case(Step(model, batch=2), mask_unit=16, **options)
    case.check()
    first = [case.versions[name]() for name in ("ours", "plain")]
    assert all(loss.isfinite() for loss in first)
    details = case.details()
    assert details["images"] == 2 and set(details["breakdown_ms"]["plain"]) == set(KINDS)


def test_the_published_masks_of_simmim_are_whole_units():
    from mimkernels.commands.bench.cases.simmim import PublishedSimMIM
    from mimkernels.models import SimMIM

    small = {"img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "mask_unit": 16}
    mask = PublishedSimMIM(SimMIM.from_timm("beit_base_patch16_224", **small)).draw_mask(3)
    units = mask.unflatten(2, (4, 2)).unflatten(1, (4, 2))  # [B, rows, 2, columns, 2]
    assert mask.shape == (3, 8, 8) and (units == units[:, :, :1, :, :1]).all()
    assert units[:, :, 0, :, 0].sum((1, 2)).tolist() == [10, 10, 10]


def test_window_attention_is_timms():
    from mimkernels.commands.bench.cases.step import Step
    from mimkernels.commands.bench.cases.windows import Stage, window_case

    for kind in ("Swin", "Swin V2"):
        for shifted in (False, True):
            case = window_case(kind, Stage(side=8, dim=16, heads=2, window=4), shifted, Step("", batch=2))
            case.check()
            assert case.details() == {"images": 2} and ("shifted" in case.name) == shifted


def test_peak_memory_counts_what_is_held_at_once():
    from mimkernels.commands.bench.memory import peak_bytes

    def run():
        for _ in range(3):
            held = torch.empty(2**20, dtype=torch.uint8)
            del held
        return torch.empty(2**18, dtype=torch.uint8)

    assert 2**20 <= peak_bytes(run, "cpu") < 2**20 + 2**18
