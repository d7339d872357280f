"""Made scenes: known depths, and the same room from the same numbers."""

import numpy as np

from mimkernels.data.scenes import CLASSES, DEPTHS, _box, _cylinder, _sphere, make_scenes


def test_rays_meet_solids_at_depths_known_by_hand():
    eye = np.array([0.0, 1.0, 0.0])
    rays = np.array([[1e-9, 1e-9, 1.0], [1e-9, 2.0, 1.0]])  # the second one passes above all of them
    for distance, normal in (
        _sphere(rays, eye, np.array([0.0, 1.0, 5.0]), 0.5),
        _box(rays, eye, np.array([0.0, 0.9, 5.0]), np.array([0.4, 0.9, 0.5]), 0.0),
        _cylinder(rays, eye, 0.0, 5.0, 0.5, 1.5),
    ):
        np.testing.assert_allclose(distance[0], 4.5, rtol=1e-6)
        np.testing.assert_allclose(normal[0], [0, 0, -1], atol=1e-6)
        assert distance[1] > 1e8
    # Of a box that is turned by an eighth, an edge comes first: half a diagonal before its middle.
    turned, _ = _box(rays, eye, np.array([0.0, 1.0, 5.0]), np.array([0.5, 0.5, 0.5]), np.pi / 4 + 1e-9)
    np.testing.assert_allclose(turned[0], 5 - np.sqrt(0.5), atol=1e-6)
    # From above, the top of a cylinder of height 1/2: down by 1/2, at slope 1/8 after a depth of 4.
    top, normal = _cylinder(np.array([[1e-9, -0.125, 1.0]]), eye, 0.0, 4.2, 0.5, 0.5)
    np.testing.assert_allclose(top[0], 4.0, rtol=1e-6)
    np.testing.assert_allclose(normal[0], [0, 1, 0])


def test_a_scene_depends_on_the_seed_and_its_number_alone():
    one, more, other = make_scenes(2, 24, 3), make_scenes(4, 24, 3), make_scenes(2, 24, 4)
    for a, b, c in zip(one, more, other, strict=True):
        assert np.array_equal(a, b[:2]) and not np.array_equal(a, c)


def test_every_class_occurs_and_depths_lie_in_their_range():
    scenes = make_scenes(20, 32, 0)
    assert set(np.unique(scenes.labels)) == set(range(len(CLASSES)))
    assert DEPTHS[0] < scenes.depths.min() and scenes.depths.max() < DEPTHS[1]
    assert scenes.images.dtype == scenes.labels.dtype == np.uint8
    # The floor is below the ceiling, and both come nearer towards the edges of the picture.
    floor, ceiling = (scenes.labels == CLASSES.index(name) for name in ("floor", "ceiling"))
    assert not ceiling[:, 16:].any() and not floor[:, :16].any()
    assert scenes.depths[:, 0].mean() < scenes.depths[:, 15].mean() > scenes.depths[:, -1].mean()
