import io
import json
import math
import os
import re
import warnings

import pytest
import torch
from PIL import Image

from mimkernels.cli import main
from mimkernels.commands.analyze import findings
from mimkernels.commands.analyze.config import AnalyzeConfig
from mimkernels.commands.analyze.figures import lines
from mimkernels.commands.analyze.run import AnalyzeRun, analyze, open_images
from mimkernels.commands.analyze.sections import change
from mimkernels.commands.analyze.series import Series, limits, series_of
from mimkernels.engine.model_names import parse_models
from mimkernels.heads import HeadStatistics
from tests.data.folders import fill

TIMM = "vit_tiny_patch16_224:pretrained=false:in_chans=1:img_size=16:patch_size=4:embed_dim=16:depth={}:num_heads=2"
A, B = f"a={TIMM.format(3)}", f"b={TIMM.format(2)}"


def settings(tmp_path, *models, **changes):
    """An analysis of tiny models on a few digits."""
    small = {"images": 24, "batch_size": 12, "device": "cpu", "workers": 0, "output": str(tmp_path / "out")}
    return AnalyzeConfig(models=list(models), **{**small, **changes})


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two models of different depths, analysed once for all tests: the result and what was printed."""
    stream = io.StringIO()
    folder = tmp_path_factory.mktemp("two")
    return analyze(settings(folder, A, B), stream=stream), stream.getvalue(), folder / "out"


def test_models_are_named_and_take_options():
    mae, vit = parse_models(["mae=runs/a:arch=vit_base_patch16_224", TIMM.format(3)])
    assert (mae.name, mae.model, mae.arch, mae.model_kwargs) == ("mae", "runs/a", "vit_base_patch16_224", {})
    assert vit.name == vit.model == "vit_tiny_patch16_224" and vit.img_size == 16 and vit.pretrained is False
    assert vit.model_kwargs == {"in_chans": 1, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    seeds = parse_models(["mae=a", "mae=b"])
    assert [choice.name for choice in seeds] == ["mae", "mae"]
    with pytest.raises(ValueError, match="two models are called 'c'"):
        parse_models(["c", "c"])


@pytest.mark.parametrize(
    "name", ["MAE (ours)", "a & <b>", "no_cls's", '"q" é模型', "$x_1$", r"$\bad{ $", "ViT-S+ v1.2", "100 %"]
)
def test_a_name_is_any_text_without_what_paths_and_options_have(name):
    (choice,) = parse_models([f"{name}=vit_tiny_patch16_224:depth=2"])
    assert (choice.name, choice.model, choice.model_kwargs) == (name, "vit_tiny_patch16_224", {"depth": 2})


@pytest.mark.parametrize("text", ["runs/a=3", "a | b=vit", "  =vit", "a\nb=vit"])
def test_paths_and_what_is_no_name_are_left_whole(text):
    assert parse_models([text])[0].model == text


def test_names_with_signs_are_text_in_charts():
    """Dollar signs are no formula, which would fail; a letter that the charts' font lacks is told of once."""
    name = r"<b>a & $\bad{ $ 模"
    series = Series(name, torch.arange(2.0), torch.ones(1, 2), torch.zeros(2))
    with pytest.warns(UserWarning, match="Glyph 27169") as told:
        drawn = [lines([series], "y", "x", {name: "#000000"}) for _ in range(3)]
    assert len(told) == 1 and all(chart.startswith("<svg") and "<b>" not in chart for chart in drawn)


def test_a_path_that_exists_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b:c=1").mkdir()
    (choice,) = parse_models(["a=b:c=1"])
    assert choice.model == "a=b:c=1" and not choice.model_kwargs


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"models": []}, "models are missing"),
        ({"images": 3}, "images must be at least 4"),
        ({"compare": ["a", "c"]}, "compare must be a name of a model: a, b"),
        ({"models": [A, "x=no_such_model"]}, "neither a file, nor a folder, nor a timm model"),
        ({"data": "/nowhere"}, "does not exist"),
    ],
)
def test_refusals_say_what_is_wrong_and_write_nothing(tmp_path, changes, told):
    given = {"models": [A, B], **changes}
    with pytest.raises(ValueError, match=told):
        analyze(settings(tmp_path, *given.pop("models"), **given))
    assert not (tmp_path / "out").exists()


def test_images_none_of_which_can_be_read_end_it_in_a_line(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(b"no image")
    words = ["analyze", A, "--data", str(folder), "--workers", "0", "--device", "cpu", "-o", str(tmp_path / "out")]
    assert main(words) == 1
    assert "error: 4 of 4 images cannot be read, such as" in capsys.readouterr().err


def test_images_that_cannot_be_read_are_told_of_in_the_terminal(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(folder / f"{number}.png")
    (folder / "5.png").write_bytes(b"no image")
    stream = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        analyze(settings(tmp_path, f"a={TIMM.format(1)}", data=str(folder)), stream=stream)
    assert "a: 5 images in" in stream.getvalue()
    assert re.search(r"a: 1 of 6 images cannot be read, such as .*5.png: .*; they are left out", stream.getvalue())


@pytest.mark.parametrize("split", ["test", "train"])
def test_of_a_folder_with_two_parts_one_is_taken_with_its_classes(split, tmp_path):
    """The two parts are no classes."""
    for part, count in (("train", 5), ("val", 4)):
        for name in ("cat", "dog"):
            fill(tmp_path / "data" / part / name, count)
    images = open_images(settings(tmp_path, A, data=str(tmp_path / "data"), split=split))
    assert images.source.name == str(tmp_path / "data" / {"test": "val", "train": "train"}[split])
    count = {"test": 4, "train": 5}[split]
    assert images.targets.tolist() == [0] * count + [1] * count


def test_who_is_interrupted_learns_what_is_kept(tmp_path):
    run = AnalyzeRun(settings(tmp_path, A))
    assert run._going_on() == "no model was finished, and nothing is kept"
    (tmp_path / "out" / "models").mkdir(parents=True)
    (tmp_path / "out" / "models" / "a.pt").touch()
    assert run._going_on().startswith("the same command goes on with the models that")


def test_bands_of_shares_end_at_zero():
    mean, spread = torch.tensor([[0.1, 0.5]]), torch.tensor([0.2, 0.2])
    shares = Series("a", torch.arange(2.0), mean, spread)
    torch.testing.assert_close(torch.stack(shares.band), torch.tensor([[0.0, 0.3], [0.3, 0.7]]))
    assert limits([shares])[0] <= 0 < 0.7 < limits([shares])[1]
    assert Series("a", torch.arange(2.0), mean, spread, signed=True).band[0][0] < 0


def test_findings_are_those_of_made_values():
    assert findings.falls_below(torch.tensor([1.0, 3.0, 2.0, 0.9, 0.8])) == 4
    assert findings.falls_below(torch.tensor([1.0, 3.0, 0.5, 1.1])) is None
    assert findings.last_quarter(torch.arange(8.0)) == 6.5 and findings.last_quarter(torch.ones(1)) == 1
    matrix = torch.tensor([[1.0, 0.2, 0.4], [0.2, 1.0, 0.6], [0.4, 0.6, 1.0]])
    assert findings.off_diagonal(matrix) == pytest.approx(0.4)


def test_every_number_is_in_the_json(two):
    result, _, folder = two
    numbers = json.loads((folder / "numbers.json").read_text())
    assert numbers == result.numbers and [model["name"] for model in numbers["models"]] == ["a", "b"]
    assert len(numbers["cka"]["a"]) == 4 and len(numbers["cka"]["b"]) == 3  # the input of the first block, too
    assert len(numbers["cka"]["a | b"]) == 4 and len(numbers["cka"]["a | b"][0]) == 3
    assert [numbers["cka"]["a"][i][i] for i in range(4)] == pytest.approx([1] * 4)
    seen = HeadStatistics.from_dict(numbers["models"][0]["runs"][0]["heads"])
    assert seen.layers == (0, 1, 2) and set(seen.images.values()) == {24}
    # Untrained models attend nearly alike to all 17 tokens, 4 x 4 patches of 4 pixels and [cls].
    assert seen.layer_mean("entropy").tolist() == pytest.approx([math.log(17)] * 3, abs=0.05)
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    places = 4 * torch.stack((y.flatten(), x.flatten()), 1)
    distance = torch.cdist(places, places).sum().item() / 16 / 17
    assert seen.layer_mean("distance").tolist() == pytest.approx([distance] * 3, rel=0.05)


def test_the_page_needs_nothing_from_outside_and_shows_every_model(two):
    _, printed, folder = two
    page = (folder / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?https?:|<link|@import""", page)
    for text in ("Attention distance", "Difference between heads", "[cls] to itself", "uniform: log 16 = 2.77", "CKA"):
        assert text in page
    assert page.count("<svg") == 5 * 2 + 5 + 4 + 6 + 3  # heads of each model, [cls] and patches, sinks, tokens, CKA
    assert "Attention of the last quarter of the layers" in printed and "report.html" in printed
    assert page.count("no accuracy by depth: 24 images") == page.count("a, b: no accuracy by depth") == 1


def test_one_more_model_costs_one_pass_and_json_alone_goes_to_standard_output(two, capsys):
    result, _, folder = two
    assert result.measured == 2
    kept = sorted((folder / "models").iterdir())
    assert len(kept) == 2
    kept[0].write_bytes(kept[0].read_bytes()[:-100])  # a damaged one is run again
    given = ["--images", "24", "--batch-size", "12", "--device", "cpu", "--workers", "0", "-o", str(folder), "--json"]
    assert main(["analyze", A, B, f"c={TIMM.format(1)}", *given]) == 0
    out, err = capsys.readouterr()
    assert err.count("kept from") == 1 and err.count("24 images in") == 2 and "report.html" in err
    cka = json.loads(out)["cka"]
    assert cka["a | b"] == result.numbers["cka"]["a | b"] and len(cka) == 6


def test_a_page_is_of_the_numbers_beside_it_when_it_is_killed(tmp_path, monkeypatch):
    analyze(settings(tmp_path, A), stream=io.StringIO())
    numbers, replace = (tmp_path / "out" / "numbers.json").read_bytes(), os.replace

    def killed(source, target):
        replace(source, target)
        if target.name == "numbers.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        analyze(settings(tmp_path, B), stream=io.StringIO())
    assert (tmp_path / "out" / "numbers.json").read_bytes() != numbers
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Two runs of one model beside another one of its depth, compared; digits of all classes, heads taken out."""
    other = TIMM.format(2) + ":init_values=0.5"
    models = [f"a={TIMM.format(2)}", f"a={other}", f"b={other}:qkv_bias=false"]
    changes = {"images": 60, "compare": ["a", "b"], "importance": 4, "viewer_images": 0}
    config = settings(tmp_path_factory.mktemp("seeds"), *models, **changes)
    return analyze(config, stream=io.StringIO())


def test_runs_of_one_name_are_seeds(seeds):
    assert [len(model.runs) for model in seeds.models] == [2, 1]
    (a, b) = series_of(seeds.models, "distance")
    assert a.runs.shape == (2, 2) and b.runs.shape == (1, 2) and a.heads.shape == (2, 2, 2)
    wanted = [run.statistics().layer_mean("distance") for run in seeds.models[0].runs]
    torch.testing.assert_close(a.mean, torch.stack(wanted).mean(0))
    assert "Thin lines are single runs" in seeds.report.read_text()


def test_two_models_are_compared(seeds):
    page = seeds.report.read_text()
    assert "From a to b" in page
    moved = change(seeds.models, "a", "b", "entropy", "heads")
    (a, b) = series_of(seeds.models, "entropy")
    torch.testing.assert_close(moved.mean, b.mean - a.mean)
    assert any(text.startswith("From a to b, layer") for text in seeds.numbers["findings"])


def test_classes_are_read_after_every_block_and_heads_taken_out(seeds):
    for model in seeds.numbers["models"]:
        for run in model["runs"]:
            assert len(run["accuracy"]) == 3 and all(0 <= value <= 1 for value in run["accuracy"])
            assert [len(heads) for heads in run["importance"]] == [2, 2] and min(map(min, run["importance"])) > 0
    assert "Heads that matter" in seeds.report.read_text() and "viewer-data" not in seeds.report.read_text()


@pytest.mark.parametrize(
    "changed, kind",
    [
        (":depth=2", "2 layers of 2 heads, 16 wide, 1 prefix tokens, 4 x 4 patches"),
        (":img_size=32", "3 layers of 2 heads, 16 wide, 1 prefix tokens, 8 x 8 patches"),
        (":embed_dim=32", "3 layers of 2 heads, 32 wide, 1 prefix tokens, 4 x 4 patches"),
        (":reg_tokens=2", "3 layers of 2 heads, 16 wide, 3 prefix tokens, 4 x 4 patches"),
    ],
)
def test_runs_of_one_name_must_be_of_one_size_before_any_runs(tmp_path, capsys, changed, kind):
    option = changed.split("=")[0]
    kept = [part for part in A.split(":") if not f":{part}".startswith(f"{option}=")]
    models = (A, ":".join(kept) + changed)
    message = f"'a' has 3 layers of 2 heads, 16 wide, 1 prefix tokens, 4 x 4 patches and {kind}: name them apart"
    with pytest.raises(ValueError, match=message):
        analyze(settings(tmp_path, *models, images=8, viewer_images=0), stream=io.StringIO())
    assert main(["analyze", *models, "--device", "cpu", "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_weights_in_another_architecture_are_another_model(tmp_path):
    options = "pretrained=false:img_size=16:patch_size=4:embed_dim=16:depth=1:num_heads=2"
    for name in ("vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224"):  # of the same random weights
        config = settings(tmp_path, f"a={name}:{options}", images=8, viewer_images=0, depth_probe=False)
        assert analyze(config, stream=io.StringIO()).measured == 1
        assert analyze(config, stream=io.StringIO()).measured == 0


def test_a_model_is_not_compared_with_itself(tmp_path):
    with pytest.raises(ValueError, match="compare must be two different models, got a a"):
        settings(tmp_path, A, B, compare=["a", "a"]).check()
