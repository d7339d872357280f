"""Made figures: joints where limbs end, flags of what is hidden, and the same figure from the same numbers."""

import numpy as np
import pytest

from mimkernels.data import figures
from mimkernels.data.figures import _Body, _Capsule, _flagged, _meet, make_figures
from mimkernels.data.joints import BONES, HIDDEN, JOINTS, SIGMAS, UNLABELLED, VISIBLE


@pytest.fixture(scope="module")
def persons():
    return make_figures(20, 24, 0)


def test_a_figure_depends_on_the_seed_and_its_number_alone(persons):
    fewer, other = make_figures(2, 24, 0), make_figures(2, 24, 1)
    for a, b, c in zip(persons, fewer, other, strict=True):
        assert np.array_equal(a[:2], b) and not np.array_equal(b, c)


def test_rays_meet_limbs_at_depths_known_by_hand():
    limb = _Capsule(np.array([2.0, 5, 1]), np.array([8.0, 5, 7]), 2.0, 0)
    hit = _meet(limb, np.array([[5.0, 5], [2, 7], [1, 5], [8, 5], [5, 7.5], [10.5, 5]]))
    np.testing.assert_allclose(hit.depth[:4], [4 + 2, 1, 1 + np.sqrt(3), 7 + 2])
    assert np.isinf(hit.depth[4:]).all()
    np.testing.assert_allclose(hit.normal[:2], [[0, 0, 1], [0, -1, 0]], atol=1e-12)  # y of a normal is up
    np.testing.assert_allclose(hit.along[:4], [3, 0, 0, 6])
    np.testing.assert_allclose(np.abs(hit.across[:3]), [0, 1, 0])
    # Straight to the camera: its near end is what is seen.
    assert _meet(_Capsule(np.array([5.0, 5, 0]), np.array([5.0, 5, 9]), 1.0, 0), np.array([[5.0, 5]])).depth == 10


def test_a_joint_is_hidden_behind_another_limb_and_unlabelled_beyond_the_picture():
    joints = np.tile([5.0, 5.0, 0.0], (len(JOINTS), 1))
    joints[1] = [12.0, 5.0, 0.0]
    joints[2] = [-0.5, 5.0, 0.0]
    own = _Capsule(np.array([5.0, 5, 0]), np.array([5.0, 9, 0]), 1.0, 0)
    before = _Capsule(np.array([3.0, 5, 4]), np.array([7.0, 5, 4]), 1.0, 0)
    radii = np.ones(len(JOINTS))
    assert (_flagged(_Body(joints, radii, [own]), 20)[[0, 1, 2], 2] == [VISIBLE, VISIBLE, UNLABELLED]).all()
    flagged = _flagged(_Body(joints, radii, [own, before]), 20)
    assert (flagged[[0, 1, 2], 2] == [HIDDEN, VISIBLE, UNLABELLED]).all()
    assert (flagged[0, :2] == 5).all() and (flagged[2] == 0).all()
    # Behind instead of before, it hides nothing.
    behind = before._replace(start=before.start * [1, 1, -1], end=before.end * [1, 1, -1])
    assert _flagged(_Body(joints, radii, [own, behind]), 20)[0, 2] == VISIBLE


def test_joints_lie_on_the_figure(monkeypatch):
    """Against a black background and in white paint, joints are bright, and the box bounds what is bright."""
    monkeypatch.setattr(figures, "_background", lambda side, rng: np.zeros((2 * side, 2 * side, 3)))
    monkeypatch.setattr(figures, "_put_clutter", lambda canvas, side, rng: None)
    monkeypatch.setattr(figures, "_patterned", lambda pattern, u, v: np.ones((*u.shape, 3)))
    monkeypatch.setattr(figures, "_put_face", lambda canvas, body: None)
    made = make_figures(6, 64, 3)
    for image, joints, box, area in zip(*made, strict=True):
        bright = image.mean(0) > 80  # the noise is of 5, the least bright side of a limb of 115; edges are mixed
        for x, y, flag in joints:
            if flag != UNLABELLED:
                row, column = int(y), int(x)
                assert bright[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].any()
        rows, columns = np.nonzero(bright)
        bounds = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose([box[0], box[1], box[0] + box[2], box[1] + box[3]], bounds, atol=1)
        assert area == pytest.approx(bright.sum(), rel=0.1)


def test_flags_of_every_kind_occur_and_boxes_lie_in_the_picture(persons):
    assert set(np.unique(persons.joints[..., 2])) == {UNLABELLED, HIDDEN, VISIBLE}
    assert ((persons.joints[..., :2] >= 0) & (persons.joints[..., :2] < 24)).all()
    assert (persons.joints[persons.joints[..., 2] == UNLABELLED] == 0).all()
    assert (persons.boxes[:, :2] >= 0).all() and (persons.boxes[:, :2] + persons.boxes[:, 2:] <= 24).all()
    assert (persons.areas > 0).all() and (persons.areas <= persons.boxes[:, 2] * persons.boxes[:, 3]).all()
    assert (persons.joints[..., 2] > 0).any(1).all()
    assert persons.images.dtype == np.uint8 and persons.joints.dtype == np.float32
    # Upright on the whole: noses above hips above ankles, in the mean.
    seen = persons.joints[(persons.joints[:, [0, 11, 15], 2] > 0).all(1)]
    assert seen[:, 0, 1].mean() < seen[:, 11, 1].mean() < seen[:, 15, 1].mean()
    assert len(JOINTS) == len(SIGMAS) == 17 and all(0 <= a < b < 17 for a, b in BONES)


def test_the_left_of_a_figure_that_faces_the_camera_is_at_the_right_of_the_picture(persons):
    both = (persons.joints[:, [5, 6], 2] > 0).all(1)
    difference = persons.joints[both, 5, 0] - persons.joints[both, 6, 0]
    assert (difference > 0).mean() > 0.8
