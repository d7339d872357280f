"""mimkernels dense: metrics with known answers, readouts that must succeed, features kept, refusals."""

import io
import json
import math
import os

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score

from mimkernels.cli import main
from mimkernels.commands.dense.charts import layer_chart
from mimkernels.commands.dense.config import DenseConfig, Readout, parse_layers
from mimkernels.commands.dense.data import DenseData, DenseImages, ScenesSource
from mimkernels.commands.dense.features import fitted_images, joined
from mimkernels.commands.dense.heads import LinearDepth, LinearSegmentation, NearestPatches, predict, train
from mimkernels.commands.dense.metrics import confusion, depth_scores, segmentation_scores
from mimkernels.commands.dense.run import dense
from mimkernels.commands.dense.tasks.depth import Depth
from mimkernels.engine.encoder import load_encoder

MODEL = "tiny=vit_tiny_patch16_224:pretrained=false:img_size=32:patch_size=8:embed_dim=24:depth=3:num_heads=2"
CPU = torch.device("cpu")


def config(tmp_path, **changes):
    return DenseConfig(
        **{
            "models": [MODEL], "train_images": 6, "test_images": 3, "side": 32, "steps": 4, "batch_size": 3,
            "pictures": 2, "device": "cpu", "precision": "fp32", "output": str(tmp_path / "dense"), **changes,
        }
    )  # fmt: skip


# ---- metrics ----


def test_segmentation_scores_by_hand():
    labels = torch.tensor([[0, 0, 0, 1], [1, 1, 255, 255]])
    predicted = torch.tensor([[0, 0, 1, 1], [1, 0, 2, 0]])
    scores = segmentation_scores(confusion(predicted, labels, 4))
    # Class 0: 2 right, 3 labelled, 3 predicted. Class 1 alike. Classes 2 and 3: ignored pixels do not count.
    assert scores.iou[:2] == [2 / 4, 2 / 4] and all(math.isnan(iou) for iou in scores.iou[2:])
    assert scores.miou == 0.5
    assert scores.accuracy == pytest.approx(4 / 6) and scores.class_accuracy == pytest.approx(2 / 3)


def test_segmentation_scores_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    labels, predicted = torch.randint(5, (2, 3, 8, 9), generator=generator)
    counts = confusion(predicted, labels, 5)
    assert counts.tolist() == confusion_matrix(labels.flatten(), predicted.flatten()).tolist()
    expected = jaccard_score(labels.flatten(), predicted.flatten(), average=None)
    assert segmentation_scores(counts).iou == pytest.approx(expected.tolist())


def test_depth_scores_by_hand_and_image_by_image():
    depths = torch.tensor([[[1.0, 2.0]], [[4.0, 99.0]]])  # 99 is not valid
    predicted = torch.tensor([[[1.1, 4.0]], [[4.0, 1.0]]])
    scores = depth_scores(zip(predicted, depths, strict=True), 0.5, 10.0)
    assert scores.rmse == pytest.approx(math.sqrt((0.1**2 + 2**2) / 2) / 2)
    assert scores.abs_rel == pytest.approx((0.1 + 1.0) / 2 / 2)
    assert scores.sq_rel == pytest.approx((0.01 + 2.0) / 2 / 2)
    assert (scores.d1, scores.d2, scores.d3) == (0.75, 0.75, 0.75)  # off by a factor of 2: beyond 1.25 cubed
    assert scores.log10 == pytest.approx((math.log10(1.1) + math.log10(2)) / 2 / 2)
    assert scores.rmse_log == pytest.approx(math.sqrt((math.log(1.1) ** 2 + math.log(2) ** 2) / 2) / 2)
    assert scores.silog == pytest.approx(100 * (math.log(2) - math.log(1.1)) / 2 / 2)


# ---- layers and readouts ----


def test_layers_by_number_name_and_together():
    assert parse_layers("last", 12) == [Readout("12", (12,))]
    assert parse_layers("quarters, 2+last", 12) == [Readout("3+6+9+12", (3, 6, 9, 12)), Readout("2+12", (2, 12))]
    assert [readout.label for readout in parse_layers("each,3", 3)] == ["1", "2", "3"]
    with pytest.raises(ValueError, match=r"layers must be in 1\.\.3 of 'small', got 4"):
        parse_layers("4", 3, "small")
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):  # of every encoder
        parse_layers("0")
    assert parse_layers("4000") == [Readout("4000", (4000,))]
    with pytest.raises(ValueError, match="layers must be numbers, last, quarters or each, .* got 'first'"):
        parse_layers("first", 3)


def test_maps_are_the_tokens_of_the_last_layer():
    from mimkernels.engine.model_names import parse_models

    (choice,) = parse_models([MODEL])
    encoder = load_encoder(choice)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    maps = encoder.maps(images, [3, 1])
    assert sorted(maps) == [1, 3] and encoder.num_layers == 3
    tokens = encoder(images).tokens[:, encoder.num_prefix :]
    torch.testing.assert_close(maps[3].flatten(2).transpose(1, 2), tokens)


def test_images_are_resized_and_turned_grey():
    images = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    images[:, 0] = 200
    assert torch.equal(fitted_images(images, 8, 3), images)
    grey = fitted_images(images, 16, 1)
    assert grey.shape == (1, 1, 16, 16) and (grey == round(0.299 * 200 + 0.701 * 100)).all()
    assert joined([torch.ones(1, 2, 4, 4), torch.ones(1, 3, 2, 2)]).shape == (1, 5, 4, 4)


def test_linear_readouts_and_neighbours_find_what_maps_hold(tmp_path):
    torch.manual_seed(0)  # of the layers' weights
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (12, 4, 4), generator=generator)
    maps = F.one_hot(labels, 3).permute(0, 3, 1, 2).float() + 0.05 * torch.randn(12, 3, 4, 4, generator=generator)
    chosen = config(tmp_path, steps=150, lr=0.03, batch_size=6)
    size = (4, 4)
    linear = LinearSegmentation(3, 3, 0.0)
    losses = train(linear, [maps], labels, chosen, 0.0, CPU, "segmentation")
    assert losses[-1] < 0.2 * losses[0]
    assert torch.equal(predict(linear.eval().predict, [maps], size, CPU), labels.to(torch.uint8))
    nearest = NearestPatches([maps[:8]], labels[:8], 3, 5, 0, CPU)
    assert torch.equal(predict(nearest.predict, [maps[8:]], size, CPU), labels[8:].to(torch.uint8))
    depths = 1.0 + 3.0 * labels
    depth = LinearDepth(3, 0.5, 10.0, 32)
    train(depth, [maps], depths, chosen, 0.0, CPU, "depth")
    scores = depth_scores(zip(predict(depth.eval().predict, [maps], size, CPU), depths, strict=True), 0.5, 10.0)
    # Their common scale comes last: the loss takes it for little. Predicting one depth has one of 77.
    assert scores.silog < 20 and scores.rmse < 1.2


def test_charts_of_nearly_equal_scores_have_a_scale_of_their_size():
    close = str(layer_chart("RMSE, m", {"a": [(1, 2.8341)], "b": [(1, 2.8327)]}))  # five decimals ran out of the chart
    assert "<!-- 2.8" in close and "<!-- 2.833" not in close
    assert "layer" in str(layer_chart("match@0.1, %", {"a": [(1, math.nan), (2, math.nan)]}))
    assert "<!-- −" not in str(layer_chart("AP, %", {"a": [(1, 0.0), (2, 0.0)]}))  # as matplotlib names its ticks
    assert "<!-- 5.0 -->" in str(layer_chart("AP, %", {"a": [(1, 5.0), (2, 5.0)]}))


# ---- the command ----


def test_the_command_from_nothing_and_again(tmp_path, capsys):
    arguments = ["dense", MODEL, "--layers", "each,quarters", "--train-images", "6", "--test-images", "3", "--side"]
    arguments += ["32", "--steps", "3", "--batch-size", "3", "--pictures", "2", "--device", "cpu", "--precision"]
    arguments += ["fp32", "-o", str(tmp_path / "out")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "tiny" in printed and "mIoU" in printed and "1+2+3" in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Which layer" in page and "wrong pixels" in page and "relative error" in page
    assert page.count('class="best"') == 1
    assert 'src="http' not in page and 'href="http' not in page
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert [result["layers"] for result in numbers["results"]] == [[1], [2], [3], [1, 2, 3]]
    assert all(0 <= result[task]["miou"] <= 1 for result in numbers["results"] for task in ("segmentation", "knn"))
    assert main(arguments) == 0
    assert "kept from before" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "numbers.json").read_text()) == numbers
    assert main([*arguments, "--overwrite"]) == 0
    assert "encoded in" in capsys.readouterr().out


def test_a_report_of_other_data_is_not_written_over(tmp_path):
    few = {"tasks": "correspondence", "layers": "last", "test_images": 1, "train_images": 2}
    dense(config(tmp_path, data="digits", **few), stream=io.StringIO())
    page = (tmp_path / "dense" / "report.html").read_bytes()
    with pytest.raises(ValueError, match="holds a report with data 'digits', these are of 'scenes'"):
        dense(config(tmp_path, data="scenes", **few), stream=io.StringIO())
    assert (tmp_path / "dense" / "report.html").read_bytes() == page
    dense(config(tmp_path, data="scenes", **few), overwrite=True, stream=io.StringIO())
    assert (tmp_path / "dense" / "report.html").read_bytes() != page


@pytest.mark.parametrize("written", ["numbers.json", "config.json", "report.html"])
def test_a_page_is_of_the_numbers_beside_it_whenever_it_is_killed(written, tmp_path, monkeypatch):
    few = {"tasks": "correspondence", "layers": "last", "data": "digits"}
    folder = tmp_path / "dense"
    dense(config(tmp_path, **few), stream=io.StringIO())
    before = {name: (folder / name).read_bytes() for name in ("report.html", "numbers.json")}
    replace = os.replace

    def killed(source, target):
        replace(source, target)
        if target.name == written:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        dense(config(tmp_path, seed=1, **few), stream=io.StringIO())
    there = [name for name in before if (folder / name).exists()]
    changed = [(folder / name).read_bytes() != before[name] for name in there]
    assert changed == ([True, True] if written == "report.html" else [True])


def test_scores_that_there_are_not_are_null(tmp_path):
    """Plain images have no points to find again; a JSON file has no NaN."""
    folder = tmp_path / "plain"
    folder.mkdir()
    Image.new("RGB", (16, 16), "red").save(folder / "red.png")
    dense(config(tmp_path, data=str(folder), tasks="all", layers="last", test_images=1), stream=io.StringIO())
    text = (tmp_path / "dense" / "numbers.json").read_text()
    (result,) = json.loads(text, parse_constant=lambda word: pytest.fail(word))["results"]
    assert result["correspondence"]["pck_10"] is None and result["correspondence"]["points"] == 0


def test_pictures_of_depths_are_scaled_by_those_that_count(monkeypatch):
    """Near is bright in pictures of what is nearer than a metre, too; a depth beyond the valid ones is black."""
    shades = []

    def taken(picture):
        shades.append(picture.mean(0)[0, :: picture.shape[2] // 4].tolist())

    monkeypatch.setattr("mimkernels.commands.dense.tasks.depth.png_address", taken)
    for scale, words in ((0.1, "from 0 m to 0.8 m"), (1.0, "from 1 m to 8 m")):
        depths = scale * torch.tensor([[[2.0, 5.0, 8.0, 300.0]]])
        shown = DenseImages(torch.zeros(1, 3, 1, 4, dtype=torch.uint8), depths=depths)
        data = DenseData(shown, shown, "images", depth_range=(0.001, 10.0))
        shades.clear()
        assert words in Depth().picture_text(data, shown)
        Depth().true_rows(data, shown)
        Depth().read_rows(data, shown, "read", 2 * depths)
        near, middle, far, beyond = shades[0]
        assert near > middle > far > 0 and beyond == 0
        assert shades[2][3] == 0  # of the errors


def test_batches_in_which_nothing_counts_teach_nothing():
    maps = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    depth, segmentation = LinearDepth(6, 0.001, 10.0, 8), LinearSegmentation(6, 3, 0.1)
    losses = [
        depth.loss(maps, torch.full((2, 8, 8), 20.0), True),
        depth.loss(maps, torch.zeros(2, 8, 8), False),
        segmentation.loss(maps, torch.full((2, 8, 8), 255, dtype=torch.uint8), False),
    ]
    sum(losses).backward()
    weights = [*depth.parameters(), *segmentation.parameters()]
    assert losses == [0, 0, 0] and all(not weight.grad.any() for weight in weights)


def test_damaged_features_are_made_anew(tmp_path):
    chosen = config(tmp_path, tasks="knn")
    first = dense(chosen)
    (kept,) = (tmp_path / "dense" / "features").glob("*.pt")
    kept.write_bytes(kept.read_bytes()[:200])
    again = dense(chosen)
    assert first.encoded == again.encoded == 1
    assert first.results[0].readings["knn"].scores == again.results[0].readings["knn"].scores
    assert dense(chosen).encoded == 0


def test_features_of_weights_in_another_architecture_are_encoded(tmp_path):
    options = "pretrained=false:img_size=16:patch_size=4:embed_dim=16:depth=1:num_heads=2"
    for name in ("vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224"):  # of the same random weights
        assert dense(config(tmp_path, models=[f"a={name}:{options}"], layers="last", tasks="knn")).encoded == 1


def test_data_without_its_target_are_refused_by_a_task_and_left_out_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(ScenesSource, "targets", ("labels",))
    with pytest.raises(ValueError, match="task 'depth' needs data with depths, but data 'scenes' have labels"):
        dense(config(tmp_path, tasks="knn,depth"))
    assert not (tmp_path / "dense").exists()
    (result,) = dense(config(tmp_path)).results
    assert list(result.readings) == ["segmentation", "knn", "correspondence"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, "models are missing"),
        (
            {"tasks": "segmentation,pose"},
            "tasks must be among segmentation, knn, depth, keypoints, correspondence, got 'pose'",
        ),
        ({"data": "rooms"}, "data must be one of scenes, .* there is no folder 'rooms'"),
        ({"layers": "5"}, r"layers must be in 1\.\.3 of 'tiny', got 5"),
        ({"train_images": 1}, "train_images must be at least 2"),
        ({"models": [MODEL, MODEL]}, "models must be of different names, got tiny, tiny"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        dense(config(tmp_path, **changes))
    assert not (tmp_path / "dense").exists()
