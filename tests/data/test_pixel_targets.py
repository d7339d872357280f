"""Folders of ADE20K and NYUv2: made files, read by hand, and refusals that name what is missing."""

import numpy as np
import pytest
import torch

from mimkernels.data.pixel_targets import ADE20KFolder, NYUv2Folder, augmented_crop, middle_square, nyu_crop, resized
from tests.data.pixel_folders import ade, colour, nyu, values


def test_ade_labels_are_one_less_and_0_is_ignored(tmp_path):
    train = ADE20KFolder(ade(tmp_path))
    assert len(train) == 2 and len(ADE20KFolder(tmp_path, train=False)) == 1
    image, labels = train.read(1)
    assert image.shape == (3, 6, 8) and image.dtype == labels.dtype == torch.uint8
    assert abs(int(image.float().mean()) - 90) <= 1
    assert labels[0].tolist() == [255, 0, 1, 2, 3, 4, 5, 6] and labels[5, 7] == 149
    assert train.classes[:3] == ["wall", "building", "class 3"] and len(train.classes) == 150


def test_ade_classes_without_names_are_numbers(tmp_path):
    assert ADE20KFolder(ade(tmp_path, names=False)).classes == [str(number) for number in range(1, 151)]


def test_nyu_depths_are_metres_and_eigens_crop_is_for_the_test(tmp_path):
    train = NYUv2Folder(nyu(tmp_path))
    image, depths = train.read(0)
    assert image.shape == (3, 6, 8) and depths.dtype == torch.float32
    assert depths[0, 0] == 0 and (depths.flatten()[1:] == 2.5).all()
    assert NYUv2Folder(tmp_path, scale=500).read(0)[1][1, 1] == 5
    _, depths = NYUv2Folder(tmp_path, train=False).read(0)
    rows, columns = (depths > 0).any(1).nonzero().flatten(), (depths > 0).any(0).nonzero().flatten()
    assert (int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])) == (45, 470, 41, 600)
    assert (depths > 0).sum() == 426 * 560


def test_nyu_in_folders_of_images_and_depths(tmp_path):
    for part in ("train", "test"):
        colour(tmp_path / part / "rgb" / "a.png")
        values(tmp_path / part / "depth" / "a.png", np.full((6, 8), 1000, np.uint16))
    assert all(float(NYUv2Folder(tmp_path, train).read(0)[1].mean()) == 1.0 for train in (True, False))


def test_pairs_are_chosen_by_the_seed_and_known_by_their_files(tmp_path):
    for number in range(9):
        colour(tmp_path / "train" / "rgb" / f"{number}.png")
        values(tmp_path / "train" / "depth" / f"{number}.png", np.full((6, 8), 1000, np.uint16))
    source = NYUv2Folder(tmp_path)
    assert source.chosen(9, 0) == source.chosen(100, 3) == list(range(9))
    assert source.chosen(4, 0) == source.chosen(4, 0) != source.chosen(4, 1)
    before = source.fingerprint()
    assert before == NYUv2Folder(tmp_path).fingerprint() != NYUv2Folder(tmp_path, scale=2.0).fingerprint()
    colour(tmp_path / "train" / "rgb" / "3.png", level=10, width=9)
    assert NYUv2Folder(tmp_path).fingerprint() != before


def test_resizing_takes_labels_from_the_nearest_pixel():
    image = torch.arange(4, dtype=torch.uint8).mul(60).expand(3, 2, 4)
    labels = torch.tensor([[1, 2, 3, 255], [1, 2, 3, 255]], dtype=torch.uint8)
    larger, far = resized(image, labels, 4)
    assert larger.shape == (3, 4, 8) and far[2].tolist() == [1, 1, 2, 2, 3, 3, 255, 255]
    square, middle = middle_square(image, labels, 2)
    assert square.shape == (3, 2, 2) and square[0, 0].tolist() == [60, 120] and middle.tolist() == [[2, 3], [2, 3]]
    upright, _ = resized(image.transpose(1, 2), labels.T, 3)
    assert upright.shape == (3, 6, 3)


def test_what_would_fill_memory_when_it_is_resized_is_refused():
    line, labels = torch.zeros(3, 1, 20000, dtype=torch.uint8), torch.zeros(1, 20000, dtype=torch.uint8)
    with pytest.raises(ValueError, match="an image of 1 x 20000 pixels, .* would have 224 x 4480000 .* 100,000,000"):
        middle_square(line, labels, 224)
    assert middle_square(line, labels, 32)[0].shape == (3, 32, 32)


def test_augmented_crops_show_what_their_labels_say():
    """A picture whose colour is its label: after zoom, crop and mirroring, it still is."""
    numbers = torch.arange(24).view(4, 6).repeat_interleave(4, 0).repeat_interleave(4, 1).to(torch.uint8)  # 16 x 24
    image = (10 * numbers).expand(3, -1, -1)
    mirrored, ignored, zooms = 0, [], []
    for number in range(40):
        square, labels = augmented_crop(image, numbers, 16, np.random.default_rng(number))
        assert square.shape == (3, 16, 16) and square.dtype == labels.dtype == torch.uint8
        ignored.append(float((labels == 255).float().mean()))
        # Between squares colours are mixed.
        right = (square[0].float() - 10 * labels.float()).abs() <= 30
        assert right[labels != 255].float().mean() > 0.55
        row = labels[3][labels[3] != 255].tolist()
        mirrored += row[0] > row[-1]
        zooms.append(sum(value == row[len(row) // 2] for value in row))
    assert 10 < mirrored < 30 and min(ignored) == 0 and 0.3 < max(ignored) < 0.75
    assert min(zooms) == 2 and max(zooms) >= 7  # pixels of a cell of 4
    again = augmented_crop(image, numbers, 16, np.random.default_rng(39))
    assert torch.equal(again[0], square) and torch.equal(again[1], labels)


def broken_ade(tmp_path, what):
    root = ade(tmp_path / "ade")
    target = root / "annotations" / "training" / "0.png"
    if what == "target":
        target.unlink()
    elif what == "part":
        (root / "images" / "training").rename(root / "images" / "train")
    elif what == "empty":
        for path in (root / "images" / "training").iterdir():
            path.unlink()
    elif what == "label":
        values(target, np.full((6, 8), 151, np.uint8))
    elif what == "size":
        values(target, np.zeros((8, 6), np.uint8))
    elif what == "colours":
        colour(target)
    elif what == "link":
        outside = tmp_path / "outside.png"
        target.rename(outside)
        target.symlink_to(outside)
    elif what == "image":
        (root / "images" / "training" / "0.jpg").write_bytes(b"no picture")
    elif what == "names":
        (root / "objectInfo150.txt").write_text("Idx Name\n1 wall\n")
    return root


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("target", "image '.*training/0.jpg' has no target '.*annotations/training/0.png'"),
        ("part", "no folder '.*images/training'; .* must hold images/ and annotations/"),
        ("empty", "no image in '.*images/training': looked for .jpg, .jpeg, .png"),
        ("label", "target '.*0.png' has a label 151, expected at most 150"),
        ("size", "target '.*0.png' has 8 x 6 pixels, its image 6 x 8"),
        ("colours", "target '.*0.png' cannot be read: expected one value per pixel, .* mode RGB"),
        ("link", "target '.*0.png' cannot be read: a link out of '.*ade', to '.*outside.png'"),
        ("image", "image '.*0.jpg' cannot be read: not an image of a known format"),
        ("names", "objectInfo150.txt' is not the table .* got 2 lines, the first 'Idx Name'"),
    ],
)
def test_refusals_of_ade(what, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ADE20KFolder(broken_ade(tmp_path, what)).read(0)


def test_refusals_of_nyu(tmp_path):
    with pytest.raises(ValueError, match="data 'nyuv2': no folder '.*nowhere' .* name it with --data-root"):
        NYUv2Folder(tmp_path / "nowhere")
    (tmp_path / "nyu_depth_v2_labeled.mat").touch()
    with pytest.raises(
        ValueError, match="no folder official_splits/test nor test; nyu_depth_v2_labeled.mat is not read"
    ):
        NYUv2Folder(tmp_path, train=False)
    (tmp_path / "sync").mkdir()
    with pytest.raises(ValueError, match="neither rgb/ and depth/ nor any picture rgb_NUMBER.jpg or .png in '.*sync'"):
        NYUv2Folder(tmp_path)
    colour(tmp_path / "sync" / "rgb_1.jpg")
    with pytest.raises(ValueError, match="image '.*rgb_1.jpg' has no target '.*sync_depth_1.png'"):
        NYUv2Folder(tmp_path)
    values(tmp_path / "sync" / "sync_depth_1.png", np.zeros((6, 8), np.uint8))
    with pytest.raises(ValueError, match="sync_depth_1.png' has 8 bits, expected depths of 16 bits"):
        NYUv2Folder(tmp_path).read(0)


def test_crops_of_depths_are_416_by_544_within_the_frame_and_keep_depths():
    depths = torch.arange(480)[:, None] * 1000.0 + torch.arange(640)
    rows, columns = torch.arange(480)[:, None].expand(480, 640) // 2, torch.arange(640).expand(480, 640) // 4
    image = torch.stack((rows, columns, columns)).to(torch.uint8)
    corners, mirrored = set(), []
    for seed in range(60):
        pixels, crop = nyu_crop(image, depths, np.random.default_rng(seed))
        assert pixels.shape == (3, 416, 544) and crop.shape == (416, 544)
        mirrored.append(bool(crop[0, 0] > crop[0, 1]))
        first = int(crop[0, -1] if mirrored[-1] else crop[0, 0])
        top, left = divmod(first, 1000)
        corners.add((top, left))
        whole = depths[top : top + 416, left : left + 544]
        assert torch.equal(crop.flip(1) if mirrored[-1] else crop, whole)
        assert torch.equal(pixels[1], (crop % 1000 // 4).to(torch.uint8))
        assert torch.equal(pixels[0], (crop // 1000 // 2).to(torch.uint8))
    tops, lefts = ({corner[axis] for corner in corners} for axis in (0, 1))
    assert (min(tops), max(tops)) == (45, 56) and 43 <= min(lefts) < 46 and 61 < max(lefts) <= 64
    assert 15 < sum(mirrored) < 45
    # Of another size, the same share of it.
    assert nyu_crop(image[:, ::4, ::4], depths[::4, ::4], np.random.default_rng(0))[1].shape == (104, 136)


@pytest.mark.parametrize("data", ["ade20k", "nyuv2"])
def test_two_images_of_one_target_are_refused(data, tmp_path):
    if data == "ade20k":
        image, kind = ade(tmp_path) / "images" / "training" / "0.jpg", ADE20KFolder
    else:
        image, kind = nyu(tmp_path) / "sync" / "kitchen_1" / "rgb_00007.jpg", NYUv2Folder
    colour(image.with_suffix(".png"))
    with pytest.raises(ValueError, match=rf"images '.*{image.name}' and '.*{image.stem}.png' have the same target '"):
        kind(tmp_path)
