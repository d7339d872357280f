"""Made scenes with exact depth and labels: rooms with spheres, boxes and cylinders, cast ray by ray from a seed."""

from typing import NamedTuple

import numpy as np

CLASSES = ("ceiling", "floor", "wall", "sphere", "box", "cylinder")
DEPTHS = (0.5, 12.0)  # between which every surface lies, in metres

_CEILING, _FLOOR, _WALL, _SPHERE, _BOX, _CYLINDER = range(6)
_FAR = 1e9
_LIGHT = np.array([0.4, 0.8, -0.45]) / np.linalg.norm([0.4, 0.8, -0.45])


class Scenes(NamedTuple):
    """Pictures of rooms, and what is seen in every pixel.

    Attributes:
        images: ``[n, 3, S, S]`` uint8.
        labels: ``[n, S, S]`` uint8, numbers in ``CLASSES``.
        depths: ``[n, S, S]`` float32, the distance along the axis of the camera in metres.
    """

    images: np.ndarray
    labels: np.ndarray
    depths: np.ndarray


def make_scenes(count: int, side: int, seed: int) -> Scenes:
    """`count` rooms of `side` pixels; room i depends on the seed and i alone."""
    made = [_scene(side, np.random.default_rng((seed, i))) for i in range(count)]
    images, labels, depths = (np.stack(parts) for parts in zip(*made, strict=True))
    return Scenes(images, labels, depths)


class _Hits:
    """The nearest surface that each ray has met so far."""

    def __init__(self, rays: np.ndarray) -> None:
        shape = rays.shape[:-1]
        self.distance = np.full(shape, _FAR)
        self.label = np.zeros(shape, np.uint8)
        self.normal = np.zeros((*shape, 3))
        self.colour = np.zeros((*shape, 3))

    def meet(self, distance: np.ndarray, label: int, normal: np.ndarray, colour: np.ndarray) -> None:
        """A surface at `distance` along each ray, ``_FAR`` where it is missed."""
        nearer = distance < self.distance
        self.distance[nearer], self.label[nearer] = distance[nearer], label
        self.normal[nearer] = np.broadcast_to(normal, self.normal.shape)[nearer]
        self.colour[nearer] = np.broadcast_to(colour, self.colour.shape)[nearer]


def _scene(side: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    across = (np.arange(side) + 0.5) / side * 2 - 1
    eye = np.array([0.0, rng.uniform(1.1, 1.7), 0.0])
    # Length 1 along the axis, so that the distance along a ray is the depth.
    rays = np.stack([*np.meshgrid(across, -across), np.ones((side, side))], -1) * [0.75, 0.75, 1.0]
    hits = _Hits(rays)
    half, height, depth = rng.uniform(2.0, 3.5), rng.uniform(2.4, 3.2), rng.uniform(6.0, 11.5)
    with np.errstate(divide="ignore", invalid="ignore"):
        for axis, at, label in ((1, 0.0, _FLOOR), (1, height, _CEILING), (0, -half, _WALL), (0, half, _WALL),
                                (2, depth, _WALL)):  # fmt: skip
            distance = (at - eye[axis]) / rays[..., axis]
            normal = -np.sign(rays[..., axis : axis + 1]) * np.eye(3)[axis]
            points = eye + rays * distance[..., None]
            hits.meet(np.where(distance > 0, distance, _FAR), label, normal, _textured(points, axis, rng))
        for _ in range(int(rng.integers(3, 8))):
            _put_object(hits, rays, eye, half, depth, rng)
    shade = 0.35 + 0.65 * np.clip(hits.normal @ _LIGHT, 0, 1) * np.clip(1.15 - hits.distance / 20, 0.4, 1)
    pixels = hits.colour * shade[..., None] + rng.normal(0, 0.02, hits.colour.shape)
    image = (255 * np.clip(pixels, 0, 1)).astype(np.uint8).transpose(2, 0, 1)
    return image, hits.label, hits.distance.astype(np.float32)


def _textured(points: np.ndarray, axis: int, rng: np.random.Generator) -> np.ndarray:
    """Colours of a plane: one, a chessboard or stripes of two."""
    first, second = rng.uniform(0.25, 0.95, (2, 3))
    u, v = (points[..., other] for other in range(3) if other != axis)
    size, kind = rng.uniform(0.4, 1.2), int(rng.integers(3))
    if kind == 0:
        return first
    cells = np.floor(np.clip(u / size, -1e6, 1e6)) + (np.floor(np.clip(v / size, -1e6, 1e6)) if kind == 1 else 0)
    return np.where((np.nan_to_num(cells) % 2 == 0)[..., None], first, second)


def _put_object(
    hits: _Hits, rays: np.ndarray, eye: np.ndarray, half: float, depth: float, rng: np.random.Generator
) -> None:
    """One sphere, box or cylinder on the floor."""
    z = rng.uniform(2.2, depth - 1.0)
    x = rng.uniform(-1, 1) * min(half - 0.7, 0.7 * z)
    size, height = rng.uniform(0.3, 0.65), rng.uniform(0.4, 1.8)
    colour = rng.uniform(0.1, 1.0, 3)
    kind = (_SPHERE, _BOX, _CYLINDER)[rng.integers(3)]
    if kind == _SPHERE:
        distance, normal = _sphere(rays, eye, np.array([x, size, z]), size)
    elif kind == _BOX:
        distance, normal = _box(rays, eye, np.array([x, height / 2, z]), np.array([size, height / 2, size]),
                                rng.uniform(0, np.pi / 2))  # fmt: skip
    else:
        distance, normal = _cylinder(rays, eye, x, z, size, height)
    hits.meet(distance, kind, normal, colour)


def _sphere(rays: np.ndarray, eye: np.ndarray, centre: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    to_eye = eye - centre
    a, b, c = (rays**2).sum(-1), rays @ to_eye, to_eye @ to_eye - radius**2
    root = b * b - a * c
    distance = np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, _FAR)
    return distance, (eye + rays * distance[..., None] - centre) / radius


def _box(
    rays: np.ndarray, eye: np.ndarray, centre: np.ndarray, halves: np.ndarray, angle: float
) -> tuple[np.ndarray, np.ndarray]:
    """A box turned about the vertical axis, by the slabs between its faces."""
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])  # world from box
    directions, origin = rays @ turn, (eye - centre) @ turn
    near, far = ((-sign * halves * np.sign(directions) - origin) / directions for sign in (1, -1))
    axis, enters, leaves = near.argmax(-1), near.max(-1), far.min(-1)
    distance = np.where((enters < leaves) & (enters > 0), enters, _FAR)
    faces = -np.sign(np.take_along_axis(directions, axis[..., None], -1)) * np.eye(3)[axis]
    return distance, faces @ turn.T


def _cylinder(
    rays: np.ndarray, eye: np.ndarray, x: float, z: float, radius: float, height: float
) -> tuple[np.ndarray, np.ndarray]:
    """An upright cylinder on the floor: its side and its top."""
    flat, to_eye = rays[..., [0, 2]], eye[[0, 2]] - [x, z]
    a, b, c = (flat**2).sum(-1), flat @ to_eye, to_eye @ to_eye - radius**2
    root = b * b - a * c
    side = np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, _FAR)
    points = eye + rays * side[..., None]
    side = np.where((points[..., 1] >= 0) & (points[..., 1] <= height), side, _FAR)
    normal = np.stack([points[..., 0] - x, np.zeros_like(side), points[..., 2] - z], -1) / radius
    top = (height - eye[1]) / rays[..., 1]
    above = eye + rays * top[..., None]
    on_top = (top > 0) & ((above[..., 0] - x) ** 2 + (above[..., 2] - z) ** 2 <= radius**2)
    top = np.where(on_top, top, _FAR)
    normal = np.where((top < side)[..., None], [0.0, 1.0, 0.0], normal)
    return np.minimum(side, top), normal
