"""COCO's keypoints from made folders: squares around boxes, places in them, and refusals."""

import os

import numpy as np
import pytest
from PIL import Image

from mimkernels.data.coco_keypoints import CocoPersons
from mimkernels.data.pixels import Decoder
from tests.data.coco import annotation, make_coco


def test_a_square_around_the_box_with_the_joints_in_it(tmp_path):
    persons = CocoPersons(make_coco(tmp_path), "train", 10, 0).load(20)
    # Of a box of 8 x 8 around (12, 9), 10 pixels a side from (7, 4) on, and twice as large.
    assert persons.joints[0, 0].tolist() == [11, 11, 2] and persons.joints[0, 5].tolist() == [15, 11, 1]
    assert persons.boxes[0].tolist() == [2, 2, 16, 16] and persons.areas[0] == 32 * 4
    rows, columns = np.nonzero(persons.images[0, 0] == persons.images[0, 0].max())
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == (11, 11)  # the white pixel is where its joint is
    assert persons.images.shape == (2, 3, 20, 20) and persons.images[0].max() > 100
    # Around (4, 8) with 20 pixels a side, from (-6, -2) on; what lies beyond the image is black, a far joint left out.
    assert persons.joints[1, 0].tolist() == [6.5, 2.5, 2] and persons.joints[1, 9].tolist() == [0, 0, 0]
    assert persons.boxes[1].tolist() == [6, 2, 8, 16]
    assert persons.images[1, 0, 2, 6] == 255 and persons.images[1].sum() == 3 * 255


def test_persons_without_joints_and_crowds_are_left_out(tmp_path):
    kept = annotation(1, 7, (8, 5, 8, 8), {0: (12, 9, 2)})
    others = [
        annotation(2, 7, (8, 5, 8, 8), {}),
        annotation(3, 7, (8, 5, 8, 8), {0: (12, 9, 2)}, iscrowd=1),
        annotation(4, 7, (8, 5, 0, 8), {0: (8, 9, 2)}, area=3),
        annotation(5, 7, (8, 5, 8, 8), {0: (12, 9, 2)}, area=0),
        annotation(6, 7, (8, 5, 8, 8), {0: (35, 9, 2)}),  # its only joint is beyond the square
    ]
    made = make_coco(tmp_path, train={"annotations": [*others[:2], kept, *others[2:]]}, images_below="images")
    assert len(CocoPersons(made, "train", 10, 0)) == 1
    assert len(CocoPersons(made, "val", 10, 0)) == 2


def test_as_many_as_wanted_are_drawn_by_the_seed(tmp_path):
    many = [annotation(i, 7, (i, 5, 8, 8), {0: (i + 2, 9, 2)}) for i in range(20)]
    made = make_coco(tmp_path, train={"annotations": many})
    drawn = [CocoPersons(made, "train", 5, seed) for seed in (0, 0, 1)]
    assert [len(each) for each in drawn] == [5, 5, 5]
    assert drawn[0].fingerprint() == drawn[1].fingerprint() != drawn[2].fingerprint()


@pytest.mark.parametrize(
    "name", ["../a.png", "/etc/passwd", "x/../../a.png", "..\\a.png", "C:\\a.png", "\\\\host\\a", ""]
)
def test_names_that_lead_out_of_the_folder_are_refused(name, tmp_path, monkeypatch):
    made = make_coco(tmp_path, train={"images": [{"id": 7, "file_name": name}]})
    monkeypatch.setattr(Decoder, "read", lambda *_: pytest.fail("an image is opened"))
    with pytest.raises(ValueError, match="expected a file_name within the folder of the images, got"):
        CocoPersons(made, "train", 10, 0)


ONE = annotation(1, 7, (8, 5, 8, 8), {0: (12, 9, 2)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "expected a list of objects as 'images', got 'None'"),
        ({"annotations": [5]}, "expected a list of objects as 'annotations'"),
        ({"images": [{"id": 7}]}, "expected an image with id and file_name"),
        (
            {"images": [{"id": 7, "file_name": "a.png"}, {"id": 7, "file_name": "b.png"}]},
            "two images have the id 7, 'a.png' and 'b.png'",
        ),
        ({"images": [{"id": 7, "file_name": "a.png", "width": 40}]}, "expected a width and a height of an image"),
        ({"annotations": [{**ONE, "keypoints": [1, 2, 3]}]}, r"expected 51 numbers as keypoints, got '\[1, 2, 3\]'"),
        ({"annotations": [{**ONE, "keypoints": [float("nan")] * 51}]}, "expected 51 numbers as keypoints"),
        ({"annotations": [{**ONE, "keypoints": [3] * 51}]}, "expected flags 0, 1 or 2"),
        ({"annotations": [{**ONE, "bbox": [1, 2, "3", 4]}]}, "expected 4 numbers as bbox"),
        ({"annotations": [{**ONE, "area": 10**400}]}, "expected a number as area"),
        ({"annotations": [{**ONE, "image_id": 99}]}, "expected the id of an image as image_id, got '99'"),
        ({"annotations": []}, "expected persons with labelled joints"),
        (
            {"images": [{"id": 7, "file_name": "c.png"}], "annotations": [ONE]},
            "1 of 1 images that .*train2017.json. names are missing, such as .*c.png",
        ),
    ],
)
def test_annotations_that_are_not_cocos_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CocoPersons(make_coco(tmp_path, train=changes), "train", 10, 0)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="data 'coco-keypoints': no folder '.*nowhere' .* name it with --data-root"):
        CocoPersons(tmp_path / "nowhere", "train", 10, 0)
    made = make_coco(tmp_path / "coco")
    (made / "train2017").rename(made / "elsewhere")
    with pytest.raises(ValueError, match="no folder '.*train2017' or '.*images/train2017'"):
        CocoPersons(made, "train", 10, 0)
    (made / "annotations" / "person_keypoints_val2017.json").write_text("{")
    with pytest.raises(ValueError, match="val2017.json' is not JSON"):
        CocoPersons(made, "val", 10, 0)
    (made / "annotations" / "person_keypoints_train2017.json").unlink()
    with pytest.raises(ValueError, match="no file '.*person_keypoints_train2017.json'; .* must hold annotations/ with"):
        CocoPersons(made, "train", 10, 0)


def test_damaged_images_and_endless_boxes_are_named(tmp_path):
    made = make_coco(tmp_path, train={"annotations": [annotation(1, 7, (0, 0, 1e9, 1e9), {0: (12, 9, 2)})]})
    with pytest.raises(ValueError, match=r"train2017/a.png' .* box of 1e\+09 x 1e\+09 is larger than max_pixels"):
        CocoPersons(made, "train", 10, 0).load(20)
    (made / "val2017" / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="val2017/b.png' cannot be read: not an image"):
        CocoPersons(made, "val", 10, 0).load(20)


def test_another_picture_of_the_same_size_is_another_one(tmp_path):
    persons = CocoPersons(make_coco(tmp_path), "train", 10, 0)
    before, path = persons.fingerprint(), tmp_path / "train2017" / "a.png"
    changed = path.stat().st_mtime_ns
    os.utime(path, ns=(changed + 1, changed + 1))
    assert persons.fingerprint() != before


@pytest.mark.parametrize(("orientation", "size"), [(6, (40, 30)), (6, (30, 40)), (3, (40, 30)), (1, (40, 30))])
def test_an_image_is_read_in_the_size_that_its_annotations_say(orientation, size, tmp_path):
    """Stored as 40 x 30 pixels, which a viewer turns: as it is stored where that is the size, otherwise upright."""
    images = [{"id": 7, "file_name": "a.png", "width": size[0], "height": size[1]}]
    white = (12, 9) if size == (40, 30) else (20, 12)  # turned by a quarter to the right, row 9 becomes column 20
    ones = [annotation(1, 7, (white[0] - 4, white[1] - 4, 8, 8), {0: (*white, 2)})]
    made = make_coco(tmp_path, train={"images": images, "annotations": ones})
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(made / "train2017" / "a.png") as picture:
        picture.copy().save(made / "train2017" / "a.png", exif=exif)
    persons = CocoPersons(made, "train", 10, 0).load(10)
    assert persons.images[0, 0].argmax() == 10 * int(persons.joints[0, 0, 1]) + int(persons.joints[0, 0, 0])


@pytest.mark.parametrize(("orientation", "told"), [(1, "40 x 30 pixels"), (6, "40 x 30 pixels, upright 30 x 40,")])
def test_an_image_of_another_size_is_refused_with_both(orientation, told, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    made = make_coco(tmp_path, train={"images": [{"id": 7, "file_name": "a.png", "width": 80, "height": 60}],
                                      "annotations": [ONE]})  # fmt: skip
    Image.new("RGB", (40, 30)).save(made / "train2017" / "a.png", exif=exif)
    with pytest.raises(ValueError, match=f"train2017/a.png' cannot be read: it has {told} and not 80 x 60"):
        CocoPersons(made, "train", 10, 0).load(10)
