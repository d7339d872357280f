"""Keypoints of mimkernels dense: places from heat maps, metrics by hand and by COCO's evaluation, made figures."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mimkernels.cli import main
from mimkernels.commands.dense.data import DenseData, DenseImages
from mimkernels.commands.dense.heads import predict, train
from mimkernels.commands.dense.heat_maps import LinearKeypoints, decoded, gaussian_maps
from mimkernels.commands.dense.keypoint_metrics import average_precision, keypoint_scores, keypoint_similarity
from mimkernels.commands.dense.sources import open_source
from mimkernels.commands.dense.tasks import keypoints
from mimkernels.commands.dense.tasks.keypoints import Keypoints
from mimkernels.data.joints import JOINTS, SIGMAS
from tests.commands.dense.test_dense import CPU, MODEL, config
from tests.data.coco import make_coco

# ---- heat maps ----


def test_a_target_has_its_height_at_the_cell_that_a_joint_is_in_the_middle_of():
    # Of 64 cells over 128 pixels, cell 10 covers pixels 20 to 22. The deviation is 64 / 32 = 2 cells.
    maps = gaussian_maps(torch.tensor([[[21.0, 41.0, 2.0]]]), (64, 64), 128)[0, 0]
    assert maps[20, 10] == 1
    assert float(maps[20, 12]) == pytest.approx(math.exp(-0.5)) and float(maps[23, 10]) == pytest.approx(
        math.exp(-9 / 8)
    )
    small = gaussian_maps(torch.tensor([[[1.0, 1.0, 2.0]]]), (8, 8), 16)[0, 0]  # one cell, not a quarter
    assert float(small[0, 1]) == pytest.approx(math.exp(-0.5))


@pytest.mark.parametrize("grid", [(24, 24), (10, 16)])
def test_places_decoded_from_targets_are_those_of_the_joints_within_a_quarter_of_a_cell(grid):
    generator = torch.Generator().manual_seed(0)
    side = 96
    cell = torch.tensor([side / grid[1], side / grid[0]])
    joints = torch.rand(20, 17, 3, generator=generator) * (side - cell.max() * 2) + cell.max()
    places = decoded(gaussian_maps(joints, grid, side), (side, side))
    assert ((places[..., :2] - joints[..., :2]).abs() <= 0.25 * cell + 1e-4).all()
    assert ((places[..., :2] - joints[..., :2]).mean((0, 1)).abs() < 0.03 * cell).all()  # no shift to one side
    assert (places[..., 2] > 0.75).all()


def test_places_at_edges_and_between_equal_neighbours_are_middles_of_cells():
    maps = torch.zeros(1, 3, 4, 8)
    maps[0, 0, 0, 0] = 1.0
    maps[0, 1, 3, 7] = 1.0
    maps[0, 2, 2, 4], maps[0, 2, 2, 5], maps[0, 2, 1, 4] = 1.0, 0.5, 0.2
    places = decoded(maps, (40, 80))[0]  # cells of 10 pixels
    assert places[:2].tolist() == [[5.0, 5.0, 1.0], [75.0, 35.0, 1.0]]
    assert places[2].tolist() == [47.5, 22.5, 1.0]


def test_the_layer_before_upsampling_is_the_layer_after_it():
    torch.manual_seed(0)
    head = LinearKeypoints(5, 3, 32).eval()
    torch.nn.init.normal_(head.linear.weight)
    maps = torch.randn(2, 5, 4, 4)
    after = head.linear(F.interpolate(head.norm(maps), scale_factor=4, mode="bilinear"))
    assert head(maps).shape == (2, 3, 16, 16)
    torch.testing.assert_close(head(maps), after, atol=1e-5, rtol=1e-5)


def test_joints_without_labels_do_not_count_in_the_loss():
    head = LinearKeypoints(3, 2, 32)
    maps, joints = torch.randn(4, 3, 8, 8), torch.full((4, 2, 3), 16.0)
    joints[:, 1, 2] = 0
    moved = joints.clone()
    moved[:, 1, :2] = 4.0
    assert head.loss(maps, joints, False) == head.loss(maps, moved, False)
    moved[:, 1, 2] = 1  # hidden, but labelled
    assert head.loss(maps, joints, False) != head.loss(maps, moved, False)
    assert head.loss(maps, torch.zeros(4, 2, 3), False) == 0


def test_a_joint_that_features_hold_is_found(tmp_path):
    """Of maps that are bright in the patch of the joint: learning brings it within that patch."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(1, 7, (16, 2), generator=generator)
    maps = 0.1 * torch.randn(16, 4, 8, 8, generator=generator)
    maps[torch.arange(16), 1, patches[:, 1], patches[:, 0]] += 1
    joints = torch.cat([4 * patches + 2.0, torch.full((16, 1), 2.0)], 1)[:, None]
    head = LinearKeypoints(4, 1, 32)
    losses = train(head, [maps], joints, config(tmp_path, steps=60, lr=0.03, batch_size=8), 0.0, CPU, "keypoints")
    assert losses[-1] < 0.7 * losses[0]
    places = predict(head.eval().predict, [maps], (32, 32), CPU)
    assert ((places[..., :2] - joints[..., :2]).abs() <= 1).all()


# ---- metrics ----


def test_scores_by_hand():
    joints = torch.tensor([[[10.0, 10, 2], [20, 10, 1], [0, 0, 0]], [[10, 10, 2], [0, 0, 0], [0, 0, 0]]])
    predicted = torch.tensor(
        [[[10.0, 14, 0.9], [20, 13, 0.9], [77, 7, 0.9]], [[10, 10, 0.1], [0, 0, 0.1], [0, 0, 0.1]]]
    )
    boxes, areas = torch.tensor([[0.0, 0, 20, 40], [0, 0, 40, 10]]), torch.tensor([100.0, 100])
    sigmas = (0.1, 0.2, 0.3)
    scores = keypoint_scores(predicted, joints, boxes, areas, sigmas)
    # Off by 4 of 40, which is not below a tenth, by 3, and by 0.
    assert (scores.pck_10, scores.pck_20) == (pytest.approx(2 / 3), 1.0)
    assert scores.joint_pck_10[:2] == [0.5, 1.0] and math.isnan(scores.joint_pck_10[2])
    similarity = keypoint_similarity(predicted, joints, areas, sigmas)
    first = (math.exp(-16 / (2 * 100 * 0.2**2)) + math.exp(-9 / (2 * 100 * 0.4**2))) / 2
    assert similarity.tolist() == pytest.approx([first, 1.0])
    assert 0.4 < first < 0.5
    # The first image, in which the net is surer, is a miss at every similarity: precision 1/2 up to recall 1/2.
    assert [scores.ap, scores.ap_50, scores.ap_75] == pytest.approx(3 * [0.5 * 51 / 101])


def test_average_precision_by_hand():
    similarity, confidence = torch.tensor([0.9, 0.2, 0.8, 0.7]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    # Found: yes, no, yes, yes. Precisions 1, 1/2, 2/3, 3/4: from recall 1/4 on the best to come is 3/4, and
    # no recall is above 3/4.
    assert average_precision(similarity, confidence, 0.5) == pytest.approx((26 * 1 + 50 * 0.75) / 101)
    assert average_precision(similarity, confidence, 0.95) == 0
    assert average_precision(similarity, confidence, 0.2) == 1


def test_persons_without_any_labelled_joint_do_not_count():
    joints, predicted = torch.zeros(2, 1, 3), torch.zeros(2, 1, 3)
    joints[0, 0] = torch.tensor([5.0, 5, 2])
    predicted[0, 0, :2] = 5
    scores = keypoint_scores(predicted, joints, torch.ones(2, 4), torch.ones(2), (0.1,))
    assert scores.pck_10 == scores.ap == 1


@pytest.mark.parametrize("noise", [1.0, 3.0, 8.0])
def test_precisions_are_those_of_cocos_evaluation(noise):
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    rng = np.random.default_rng(int(noise))
    count = 60
    joints = np.concatenate([rng.uniform(5, 90, (count, 17, 2)), rng.integers(0, 3, (count, 17, 1))], 2)
    joints[:, 0, 2] = 2  # somewhere in every image
    joints[joints[..., 2] == 0] = 0
    spread = noise * rng.uniform(0.1, 2, (count, 1, 1))
    places = joints[..., :2] + spread * rng.normal(size=(count, 17, 2))
    predicted = np.concatenate([places, rng.uniform(size=(count, 17, 1))], 2)
    boxes, areas = np.tile([5.0, 5, 85, 85], (count, 1)), rng.uniform(500, 5000, count)
    truth = {
        "images": [{"id": i} for i in range(count)],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [
            {
                "id": i + 1, "image_id": i, "category_id": 1, "iscrowd": 0, "keypoints": joints[i].ravel().tolist(),
                "num_keypoints": int((joints[i, :, 2] > 0).sum()), "bbox": boxes[i].tolist(), "area": areas[i],
            }
            for i in range(count)
        ],
    }  # fmt: skip
    read = [
        {
            "image_id": i,
            "category_id": 1,
            "keypoints": predicted[i].ravel().tolist(),
            "score": predicted[i, :, 2].mean(),
        }
        for i in range(count)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        held = coco.COCO()
        held.dataset = truth
        held.createIndex()
        evaluation = cocoeval.COCOeval(held, held.loadRes(read), "keypoints")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    scores = keypoint_scores(*map(torch.from_numpy, (predicted, joints, boxes, areas)), SIGMAS)
    assert 0 < scores.ap < 1
    assert (scores.ap, scores.ap_50, scores.ap_75) == pytest.approx(evaluation.stats[:3].tolist(), abs=1e-12)
    assert evaluation.params.kpt_oks_sigmas.tolist() == pytest.approx(SIGMAS)


def test_of_a_pair_the_one_that_is_labelled_counts_in_the_chart(monkeypatch):
    """Joint by joint; it was NaN. Of joints that are labelled nowhere there is no bar."""
    drawn = {}
    monkeypatch.setattr(
        keypoints, "bar_chart", lambda groups, bars, *_: drawn.update(zip(groups, bars["a"], strict=True))
    )
    truth = torch.zeros(1, 17, 3)
    truth[:, [1, 3, 4], 2] = 2.0  # the left eye and both ears
    read = truth.clone()
    read[:, 4, 0] = 9.0
    scores = keypoint_scores(read, truth, torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([64.0]), SIGMAS)
    Keypoints().sections(None, {"a": scores})
    assert (drawn["eyes"], drawn["ears"]) == (100, 50) and math.isnan(drawn["nose"]) and math.isnan(drawn["hips"])


# ---- the command ----


def test_figures_from_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["dense", MODEL, "--data", "figures", "--layers", "1,3", "--train-images", "4", "--test-images", "3"]
    arguments += ["--side", "32", "--steps", "3", "--batch-size", "2", "--pictures", "2", "--device", "cpu"]
    assert main([*arguments, "--precision", "fp32", "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "4 + 3 figures" in printed and "PCK@0.1" in printed and "AP75" in printed and "mIoU" not in printed
    page = (out / "report.html").read_text()
    assert "Joint by joint" in page and "Which layer" in page and "the person&#39;s left" in page
    assert page.count('alt="tiny, layer 1, test image') + page.count('alt="tiny, layer 3, test image') == 2
    numbers = json.loads((out / "numbers.json").read_text())
    assert [sorted(result["losses"]) for result in numbers["results"]] == [["keypoints"]] * 2
    for result in numbers["results"]:
        assert result["keypoints"]["joints"] == list(JOINTS) and len(result["keypoints"]["joint_pck_20"]) == 17
        assert 0 <= result["keypoints"]["pck_10"] <= result["keypoints"]["pck_20"] <= 1


def test_scenes_have_no_keypoints_and_figures_no_depths(tmp_path):
    with pytest.raises(ValueError, match="task 'keypoints' needs data with keypoints, but data 'scenes' have labels"):
        Keypoints().check(open_source(config(tmp_path)))
    assert main(["dense", MODEL, "--data", "figures", "--tasks", "keypoints,depth", "-o", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()


def test_pictures_show_what_is_off_in_red(tmp_path, monkeypatch):
    """Two joints of a person of 20 pixels: one read in its place, one 8 pixels off."""
    from mimkernels.commands.dense.tasks import keypoints as module

    pictures = []
    monkeypatch.setattr(module, "png_address", lambda picture: pictures.append(picture) or "")
    joints = torch.zeros(1, 17, 3)
    joints[0, 9], joints[0, 10] = torch.tensor([8.0, 8, 2]), torch.tensor([8.0, 24, 2])
    shown = DenseImages(
        torch.full((1, 3, 32, 32), 128, dtype=torch.uint8), keypoints=joints, boxes=torch.tensor([[0.0, 0, 20, 20]])
    )
    predictions = joints.clone()
    predictions[0, 10, 0] += 8
    ((name, _),) = Keypoints().read_rows(DenseData(shown, shown, ""), shown, "tiny", predictions)
    red = (pictures[0] - torch.tensor([0xFF, 0x3B, 0x3B]).view(3, 1, 1) / 255).abs().amax(0) < 0.01
    rows, columns = red.nonzero().T / 4  # pixels of the picture are a quarter as large
    assert name == "tiny" and red.any()
    assert 22 <= rows.min() <= rows.max() <= 26 and columns.min() <= 9 and columns.max() >= 15


def test_cocos_folders(tmp_path, capsys):
    make_coco(tmp_path / "coco")
    arguments = ["dense", MODEL, "--data", "coco-keypoints", "--side", "32", "--steps", "2", "--batch-size", "2"]
    arguments += ["--pictures", "1", "--device", "cpu", "--precision", "fp32", "-o", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "data 'coco-keypoints' lie in a folder: give it as --data-root DIR" in capsys.readouterr().err
    assert main([*arguments, "--data-root", str(tmp_path / "nowhere")]) == 2
    assert not (tmp_path / "out").exists()
    arguments += ["--data-root", str(tmp_path / "coco")]
    assert main(arguments) == 0
    assert "2 + 2 persons" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "out" / "numbers.json").read_text())["results"]
    assert sorted(result["losses"]) == ["keypoints"]
    (tmp_path / "coco" / "val2017" / "a.png").write_bytes(b"")
    assert main(arguments) == 1
    assert "a.png' cannot be read" in capsys.readouterr().err


def test_made_data_take_no_folder(tmp_path):
    with pytest.raises(ValueError, match="data 'scenes' are made, not read: leave out data_root, got 'here'"):
        open_source(config(tmp_path, data_root="here"))
