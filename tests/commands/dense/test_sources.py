"""Data of `mimkernels dense`: folders of ADE20K and NYUv2, whole images, augmented copies, images alone."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mimkernels.cli import main
from mimkernels.commands.dense.config import DenseConfig
from mimkernels.commands.dense.heads import Reader, predict_squares
from mimkernels.commands.dense.run import dense
from mimkernels.commands.dense.sources import open_source
from mimkernels.engine.command import TrainingError
from tests.data.folders import fill
from tests.data.pixel_folders import ade, colour, nyu, values

MODEL = "tiny=vit_tiny_patch16_224:pretrained=false:img_size=32:patch_size=8:embed_dim=24:depth=1:num_heads=2"


def config(tmp_path, **changes):
    in_folder = {"data_root": str(tmp_path / "data")} if changes.get("data") in ("ade20k", "nyuv2") else {}
    return DenseConfig(
        **{
            "models": [MODEL], "train_images": 6, "test_images": 3, "side": 32,
            "steps": 3, "batch_size": 2, "pictures": 1, "device": "cpu", "precision": "fp32",
            "output": str(tmp_path / "dense"), **in_folder, **changes,
        }
    )  # fmt: skip


def test_ade_square_and_whole(tmp_path):
    """Whole images are scored at their own size, with every labelled pixel of theirs."""
    ade(tmp_path / "data")
    data = open_source(config(tmp_path, data="ade20k", side=8, test_on="whole")).load()
    assert len(data.train) == 2 and len(data.test) == 1 and data.classes[1] == "building"
    assert data.test.images.shape == (1, 3, 8, 8) and data.whole.labels[0].shape == (6, 8)
    assert data.whole.windows.sizes == [(8, 11)] and data.whole.windows.corners == [[(0, 0), (0, 3)]]
    (result,) = dense(config(tmp_path, data="ade20k", side=32, test_on="whole", tasks="segmentation,knn")).results
    (square,) = dense(config(tmp_path, data="ade20k", side=32, tasks="segmentation,knn")).results
    assert 0 <= result.readings["segmentation"].scores.miou <= 1 and 0 <= square.readings["knn"].scores.miou <= 1
    page = (tmp_path / "dense" / "report.html").read_text()
    assert "The first 30 of 150 classes" in page and "building" in page


def test_whole_images_that_are_squares_score_as_squares(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("training", 3), ("validation", 2)):
        for number in range(count):
            image = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
            colour(tmp_path / "data" / "images" / part / f"{number}.png")
            Image.fromarray(image).save(tmp_path / "data" / "images" / part / f"{number}.png")
            labels = (image[..., 0] // 64).repeat(1, 0)
            values(tmp_path / "data" / "annotations" / part / f"{number}.png", labels)
    scores = []
    for test_on in ("square", "whole"):
        chosen = config(tmp_path, data="ade20k", test_on=test_on, tasks="segmentation,knn")
        (result,) = dense(chosen).results
        scores.append([result.readings[name].scores for name in ("segmentation", "knn")])
    for square, whole in zip(*scores, strict=True):
        assert square[:3] == pytest.approx(whole[:3])


def test_nyu_square_and_whole(tmp_path):
    nyu(tmp_path / "data", level=2500)
    data = open_source(config(tmp_path, data="nyuv2", side=48, test_on="whole")).load()
    assert data.depth_range == (0.001, 10.0) and data.whole.windows.sizes == [(48, 64)]
    assert data.whole.depths[0].shape == (480, 640) and (data.whole.depths[0] == 2.5).sum() == 426 * 560
    nyu(tmp_path / "data", level=5005)
    colour(tmp_path / "data" / "sync" / "rgb_2.png")
    values(tmp_path / "data" / "sync" / "sync_depth_2.png", np.full((6, 8), 5005, np.uint16))
    for test_on in ("square", "whole"):
        # Untrained, the layer says what lies in the middle of 0.001 m to 10 m, about what is there.
        chosen = config(tmp_path, data="nyuv2", test_on=test_on, tasks="depth", steps=1, lr=1e-9)
        (result,) = dense(chosen).results
        assert result.readings["depth"].scores.rmse < 1


def test_targets_that_say_nothing_are_refused(tmp_path):
    nyu(tmp_path / "data", level=20_000)
    told = r"no pixel of the images to learn from has a depth between 0.001 m and 10 m; they are from 20 m to 20 m"
    with pytest.raises(TrainingError, match=told):
        dense(config(tmp_path, data="nyuv2", tasks="depth"))
    ade(tmp_path / "data")
    for number in range(2):
        values(tmp_path / "data" / "annotations" / "training" / f"{number}.png", np.zeros((6, 8), np.uint8))
    for task in ("segmentation", "knn"):
        with pytest.raises(TrainingError, match="no pixel of the images to learn from has a label"):
            dense(config(tmp_path, data="ade20k", tasks=task))
    assert not (tmp_path / "dense" / "features").exists()


def test_nyu_is_learnt_from_crops_at_the_scale_that_it_is_tested_at(tmp_path):
    """Of 416 x 544 pixels, 416 become the side; of a whole image of 480 x 640, 480 become 480 / 416 of it."""
    nyu(tmp_path / "data")
    depths = np.add.outer(np.arange(480) * 5, np.arange(640) * 8).astype(np.uint16) + 1
    colour(tmp_path / "data" / "sync" / "rgb_2.png", 480, 640)
    values(tmp_path / "data" / "sync" / "sync_depth_2.png", depths)
    data = open_source(config(tmp_path, data="nyuv2", side=208, copies=3, test_on="whole")).load()
    # The large image and the small one, three crops each of two windows.
    assert data.train.images.shape == (12, 3, 208, 208) and data.train.depths.shape == (12, 208, 208)
    assert data.whole.windows.sizes == [(240, 320)] and data.test.images.shape == (1, 3, 208, 208)
    assert data.whole.windows.corners == [[(0, 0), (0, 112), (32, 0), (32, 112)]]
    left, right = data.train.depths[:6].unflatten(0, (3, 2)).unbind(1)
    # Windows of a crop overlap but for 272 - 208 pixels, at half its pixels; depths are levels of the file.
    assert torch.equal(left[:, :, 64:], right[:, :, :-64])
    steps = (left[:, :, 1:] - left[:, :, :-1]).abs()
    assert torch.allclose(steps, torch.tensor(0.016), atol=1e-6)
    assert not torch.equal(left[0], left[1])


def test_what_is_read_is_averaged_with_the_mirror_image(tmp_path):
    """With it, mirrored test images have the same scores, mirrored; without, others."""
    rng = np.random.default_rng(0)
    for name in ("plain", "mirrored"):
        nyu(tmp_path / name)
    for number in range(4):
        picture = rng.integers(256, size=(480, 640, 3), dtype=np.uint8)
        depths = rng.integers(1000, 9000, size=(24, 32), dtype=np.uint16).repeat(20, 0).repeat(20, 1)
        depths[:45], depths[471:], depths[:, :41], depths[:, 599:] = 0, 0, 0, 0  # Eigen's crop, made symmetric
        for name, turn in (("plain", 1), ("mirrored", -1)):
            part = "sync" if number < 2 else "official_splits/test"
            for file, array in ((f"rgb_{number}.png", picture), (f"sync_depth_{number}.png", depths)):
                turned = array if number < 2 else np.ascontiguousarray(array[:, ::turn])
                values(tmp_path / name / part / file, turned)
    scores = {}
    for name in ("plain", "mirrored"):
        for flip in (None, False):
            chosen = config(tmp_path, data="nyuv2", data_root=str(tmp_path / name), tasks="depth", test_on="whole",
                            flip_test=flip, test_images=2)  # fmt: skip
            chosen.data_root, chosen.output = str(tmp_path / name), str(tmp_path / f"{name}-{flip}")
            result = dense(chosen)
            scores[name, flip] = result.results[0].readings["depth"].scores
            assert ("averaged with its mirror image" in result.report.read_text()) == (flip is None)
    assert scores["plain", None] == pytest.approx(scores["mirrored", None], rel=1e-3)
    assert scores["plain", False] != pytest.approx(scores["mirrored", False], rel=1e-3)
    assert scores["plain", None] != scores["plain", False]


def test_the_mean_of_an_image_and_its_mirror_image_by_hand():
    class Plain(Reader):
        def values(self, maps, size):
            return maps

        def decide(self, values):
            return values[:, 0]

    maps, mirrored = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[10.0, 20.0]]]])
    cpu = torch.device("cpu")
    assert predict_squares(Plain(), [maps], (1, 2), cpu, [mirrored]).tolist() == [[[10.5, 6.0]]]
    assert predict_squares(Plain(), [maps], (1, 2), cpu, []).tolist() == [[[1.0, 2.0]]]


def test_copies_are_learnt_in_place_of_the_images(tmp_path):
    ade(tmp_path / "data")
    data = open_source(config(tmp_path, data="ade20k", copies=8)).load()
    assert data.train.images.shape == (16, 3, 32, 32) and data.train.labels.shape == (16, 32, 32)
    assert len({tuple(each.flatten().tolist()) for each in data.train.labels}) == 16
    beyond = (data.train.labels == 255).flatten(1).float().mean(1)
    assert (beyond == 0).any() and (beyond > 0.2).any()
    scenes = open_source(config(tmp_path, copies=2)).load()
    assert len(scenes.train) == 12 and scenes.train.depths is None and len(scenes.test) == 3
    plain = open_source(config(tmp_path)).load()
    assert len(plain.train) == 6 and torch.equal(plain.test.images, scenes.test.images)


def test_images_alone_have_correspondence(tmp_path, capsys):
    fill(tmp_path / "images", count=5)
    arguments = ["dense", MODEL, "--data", str(tmp_path / "images"), "--test-images", "4", "--side", "32", "--device"]
    arguments += ["cpu", "--precision", "fp32", "--pictures", "2", "-o", str(tmp_path / "out")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "match@0.1" in printed and "mIoU" not in printed and "4 images in" in printed
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    (result,) = numbers["results"]
    scores = result["correspondence"]
    assert 0 <= scores["pck_5"] <= scores["pck_10"] <= 1 and 0 < scores["points"] <= 4 * 256 and result["losses"] == {}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "right places" in page and page.count("data:image/png") == 2 * 3
    assert main(arguments) == 0
    assert "kept from before" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "numbers.json").read_text()) == numbers
    assert main([*arguments, "--seed", "1"]) == 0  # other warps, which are encoded
    assert "encoded in" in capsys.readouterr().out


def test_broken_images_of_a_folder_are_left_out_and_changed_ones_encoded_anew(tmp_path, capsys):
    folder = fill(tmp_path / "images", count=4)
    arguments = ["dense", MODEL, "--data", str(folder), "--side", "32", "--device", "cpu", "--precision", "fp32"]
    arguments += ["--pictures", "1", "-o", str(tmp_path / "out")]
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[:60])
    (folder / "3.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"2 of 4 images cannot be read, such as .*1\.png: .*; they are left out"):
        assert main(arguments) == 0
    assert "2 test images" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Left out" in page and "2 of 4 images cannot be read" in page
    (folder / "1.png").write_bytes(whole)
    (folder / "3.png").write_bytes((folder / "0.png").read_bytes())
    assert main(arguments) == 0  # with features of four images
    assert "4 test images" in capsys.readouterr().out
    (folder / "0.png").write_bytes(whole)  # another picture of the same name
    assert main(arguments) == 0
    assert "encoded in" in capsys.readouterr().out
    for path in folder.iterdir():
        path.write_bytes(b"no picture")
    assert main(arguments) == 1
    assert "error: 4 of 4 images cannot be read, such as" in capsys.readouterr().err


def test_of_a_folder_with_two_parts_the_test_is_taken(tmp_path):
    for part, count in (("train", 4), ("val", 3)):
        fill(tmp_path / "images" / part / "cat", count)
    data = open_source(config(tmp_path, data=str(tmp_path / "images"), test_images=10)).load()
    assert len(data.test) == 3


def test_images_alone_have_no_labels(tmp_path):
    images = str(fill(tmp_path / "images", count=2))
    with pytest.raises(ValueError, match="task 'knn' needs data with labels, but data '.*images' have images alone"):
        dense(config(tmp_path, data=images, tasks="knn"))


def test_a_broken_picture_ends_the_run_with_its_name(tmp_path):
    ade(tmp_path / "data")
    (tmp_path / "data" / "images" / "validation" / "0.jpg").write_bytes(b"no picture")
    with pytest.raises(TrainingError, match="image '.*validation/0.jpg' cannot be read"):
        dense(config(tmp_path, data="ade20k", tasks="knn"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": "nowhere"},
            "data must be one of scenes, .*ade20k.*, or images alone: .*; there is no folder 'nowhere'",
        ),
        ({"data": "ade20k"}, "data 'ade20k': no folder '.*data' .* name it with --data-root"),
        ({"test_on": "whole"}, "test_on must be square with data 'scenes'; whole images are those of ade20k, nyuv2"),
        ({"test_on": "all"}, "test_on must be one of square, whole, got all"),
        ({"copies": 2}, "copies must be 0 for task 'depth', got 2: .* but not depths"),
        ({"copies": 2, "tasks": "correspondence"}, "copies are learnt from, got 2, but the tasks learn nothing: corr"),
        ({"flip_test": True, "tasks": "correspondence"}, "flip_test averages .* labels or depths, the tasks are corr"),
        ({"copies": -1}, "copies must be 0 or more, got -1"),
        ({"depth_scale": 0.0}, "depth_scale must be positive and finite, got 0.0"),
        ({"depth_scale": 256.0}, "depth_scale must be left out: it is of data 'nyuv2', not 'scenes', got 256.0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        dense(config(tmp_path, **changes))
    assert not (tmp_path / "dense").exists()
