"""Made figures with exact joints: bodies of capsules in random poses before clutter, drawn from a seed.

A body is a tree of joints in three dimensions, posed within the limits of human joints and seen by parallel rays. Limbs
are capsules around its bones; the one in front covers the others, which decides what is visible. Colours and patterns
of limbs are drawn for each figure and each side of it, so that they tell no joint, and the clutter behind has limbs of
its own. Left and right are told apart by the face, which is in profile at most.
"""

from typing import NamedTuple

import numpy as np

from mimkernels.data.joints import HIDDEN, JOINTS, UNLABELLED, VISIBLE, Persons

_SAMPLES = 2  # a side of each pixel
_MARGIN = 0.2  # of a figure's box that may lie beyond the picture
_LIGHT = np.array([-0.45, 0.55, 0.7]) / np.linalg.norm([-0.45, 0.55, 0.7])
_COVERED = 1.3  # a joint is hidden where something lies in front of it by more than so many radii of its own limb


class _Capsule(NamedTuple):
    """A rounded limb, in pixels: x to the right, y down, z to the camera."""

    start: np.ndarray  # [3]
    end: np.ndarray  # [3]
    radius: float
    paint: int  # number of a pattern


class _Pattern(NamedTuple):
    """Two colours, plain, in stripes across or along a limb, or in checks; `width` in radii."""

    first: np.ndarray
    second: np.ndarray
    kind: int
    width: float


class _Body(NamedTuple):
    joints: np.ndarray  # [17, 3]
    radii: np.ndarray  # [17] of the limbs around them
    capsules: list[_Capsule]


def make_figures(count: int, side: int, seed: int) -> Persons:
    """`count` pictures of `side` pixels with a figure each; figure i depends on the seed and i alone."""
    made = [_figure(side, np.random.default_rng((seed, i))) for i in range(count)]
    return Persons(*(np.stack(parts) for parts in zip(*made, strict=True)))


def _figure(side: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    body = _placed(_posed(rng), side, rng)
    canvas = _Canvas(side)
    canvas.colour[:] = _background(side, rng)
    _put_clutter(canvas, side, rng)
    canvas.depth[:] = -np.inf  # the figure stands before all of it
    palette = [_pattern(rng) for _ in range(len(_PAINTS))]
    for capsule in body.capsules:
        canvas.draw(capsule, palette[capsule.paint])
    covered = np.isfinite(canvas.depth)
    _put_face(canvas, body)
    rows, columns = np.nonzero(covered)
    left, top, right, bottom = (
        bound / _SAMPLES for bound in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    )
    box = np.array([left, top, right - left, bottom - top], np.float32)
    pixels = canvas.colour.reshape(side, _SAMPLES, side, _SAMPLES, 3).mean((1, 3)) + rng.normal(
        0, 0.02, (side, side, 3)
    )
    image = (255 * np.clip(pixels, 0, 1)).astype(np.uint8).transpose(2, 0, 1)
    return image, _flagged(body, side), box, np.array(covered.sum() / _SAMPLES**2, np.float32)


def _flagged(body: _Body, side: int) -> np.ndarray:
    """Joints ``[17, 3]`` with their flags."""
    places = body.joints[:, :2]
    front = np.full(len(JOINTS), -np.inf)
    for capsule in body.capsules:
        front = np.maximum(front, _meet(capsule, places).depth)
    hidden = front - body.joints[:, 2] > _COVERED * body.radii
    inside = ((places >= 0) & (places < side)).all(1)
    flags = np.where(inside, np.where(hidden, HIDDEN, VISIBLE), UNLABELLED)
    joints = np.concatenate([places, flags[:, None]], 1).astype(np.float32)
    joints[~inside] = 0
    return joints


# ---- bodies ----

_PAINTS = ("shirt", "trousers", "skin", "left arm", "right arm", "left leg", "right leg")


def _posed(rng: np.random.Generator) -> _Body:
    """A body of height about 1 around its hips: x to the picture's right, y up, z to the camera."""
    size = rng.uniform(0.88, 1.12, 8)  # of its parts, each by itself
    spread = rng.uniform(0.85, 1.15)  # thickness of all of it
    radius = spread * np.array([0.026, 0.034, 0.044])  # forearms, upper arms and shanks, thighs
    degrees = rng.uniform
    facing = _about_y(degrees(-70, 70))
    joints = np.zeros((len(JOINTS), 3))
    capsules: list[_Capsule] = []

    def limb(start: np.ndarray, end: np.ndarray, thick: float, paint: str) -> None:
        capsules.append(_Capsule(start, end, thick, _PAINTS.index(paint)))

    trunk = facing @ _about_z(degrees(-18, 18)) @ _about_x(degrees(-12, 35))
    hips, shoulders = 0.062 * size[0], 0.125 * size[1]
    neck = trunk @ [0, 0.30 * size[2], 0]
    for number, x, y in ((11, hips, 0.0), (12, -hips, 0.0), (5, shoulders, 0.27), (6, -shoulders, 0.27)):
        joints[number] = trunk @ [x, y * size[2], 0]
    for a, b in ((5, 6), (11, 12), (5, 11), (6, 12)):
        limb(joints[a], joints[b], 0.045 * spread, "trousers" if (a, b) == (11, 12) else "shirt")
    limb(neck * 0.8, neck * 0.12, 0.075 * spread, "shirt")

    head = trunk @ _about_y(degrees(-20, 20)) @ _about_x(degrees(-20, 20)) @ _about_z(degrees(-15, 15))
    round_head = 0.072 * size[3]
    middle = neck + head @ [0, 0.075 * size[3] + 0.03, 0.012]
    limb(neck, middle, 0.03 * spread, "skin")
    limb(middle, middle + head @ [0, 0.025, 0], round_head, "skin")
    for number, place in enumerate(((0, -0.1, 1), (0.42, 0.22, 0.88), (-0.42, 0.22, 0.88), (1, 0, 0), (-1, 0, 0))):
        joints[number] = middle + head @ (round_head * np.array(place) / np.linalg.norm(place))

    for left, (shoulder, elbow, wrist, hip, knee, ankle) in ((1, (5, 7, 9, 11, 13, 15)), (-1, (6, 8, 10, 12, 14, 16))):
        side = "left" if left == 1 else "right"
        upper = (
            trunk @ _about_z(left * degrees(3, 150)) @ _about_x(-degrees(-45, 100)) @ _about_y(left * degrees(-60, 60))
        )
        lower = upper @ _about_x(-degrees(0, 140))
        joints[elbow] = joints[shoulder] + upper @ [0, -0.165 * size[4], 0]
        joints[wrist] = joints[elbow] + lower @ [0, -0.15 * size[5], 0]
        limb(joints[shoulder], joints[elbow], radius[1], f"{side} arm")
        limb(joints[elbow], joints[wrist], radius[0], f"{side} arm" if rng.random() < 0.5 else "skin")
        limb(joints[wrist], joints[wrist] + lower @ [0, -0.045, 0], 0.9 * radius[0], "skin")
        thigh = (
            trunk @ _about_z(left * degrees(-4, 40)) @ _about_x(-degrees(-25, 85)) @ _about_y(left * degrees(-15, 25))
        )
        shank = thigh @ _about_x(degrees(0, 110))
        joints[knee] = joints[hip] + thigh @ [0, -0.24 * size[6], 0]
        joints[ankle] = joints[knee] + shank @ [0, -0.23 * size[7], 0]
        limb(joints[hip], joints[knee], radius[2], f"{side} leg")
        limb(joints[knee], joints[ankle], radius[1], f"{side} leg" if rng.random() < 0.6 else "skin")
        limb(joints[ankle], joints[ankle] + shank @ [0, -0.02, 0.075], 0.9 * radius[0], f"{side} leg")
    # Of the thickest limb that ends there, from the nose to the ankles.
    thick = (0.3 * round_head, 0.045 * spread, radius[1], radius[0], 0.045 * spread, radius[2], radius[1])
    return _Body(joints, np.repeat(thick, (5, 2, 2, 2, 2, 2, 2)), capsules)


def _placed(body: _Body, side: int, rng: np.random.Generator) -> _Body:
    """A body in pixels, y down, its box of 0.5 to 0.95 of the picture's side and mostly within the picture."""
    ends = np.array([[c.start, c.end] for c in body.capsules]).reshape(-1, 3)
    thick = np.repeat([c.radius for c in body.capsules], 2)[:, None]
    low, high = (ends - thick).min(0)[:2], (ends + thick).max(0)[:2]
    scale = rng.uniform(0.5, 0.95) * side / (high - low).max()
    extent = scale * (high - low)
    room = side - extent
    corner = rng.uniform(-_MARGIN * extent, room + _MARGIN * extent)  # of the box: left and top

    def moved(points: np.ndarray) -> np.ndarray:
        x, y = corner[0] + scale * (points[..., 0] - low[0]), corner[1] + scale * (high[1] - points[..., 1])
        return np.stack([x, y, scale * points[..., 2]], -1)

    capsules = [_Capsule(moved(c.start), moved(c.end), scale * c.radius, c.paint) for c in body.capsules]
    return _Body(moved(body.joints), scale * body.radii, capsules)


def _about_x(degrees: float) -> np.ndarray:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])


def _about_y(degrees: float) -> np.ndarray:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])


def _about_z(degrees: float) -> np.ndarray:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


# ---- pictures ----


class _Hit(NamedTuple):
    """Where rays through places meet a capsule."""

    depth: np.ndarray  # [...]: z of the surface, -inf where it is missed
    along: np.ndarray  # [...]: from the start, in pixels
    across: np.ndarray  # [...]: from the axis, -1 to 1 radii
    normal: np.ndarray  # [..., 3]: x to the right, y up, z to the camera


def _meet(capsule: _Capsule, places: np.ndarray) -> _Hit:
    """Parallel rays at ``[..., 2]``: the frontmost of the spheres around the nearest place of the axis and its ends."""
    axis = (capsule.end - capsule.start)[:2]
    rise, length = float((capsule.end - capsule.start)[2]), float(np.hypot(*axis))
    offset = places - capsule.start[:2]
    nearest = np.clip(offset @ axis / max(length**2, 1e-12), 0, 1)
    depth = np.full(nearest.shape, -np.inf)
    along, normal = np.zeros_like(depth), np.zeros((*depth.shape, 3))
    for share in (nearest, np.zeros_like(nearest), np.ones_like(nearest)):
        away = (offset - share[..., None] * axis) / capsule.radius
        squared = (away**2).sum(-1)
        up = np.sqrt(np.clip(1 - squared, 0, None))
        surface = np.where(squared <= 1, capsule.start[2] + share * rise + capsule.radius * up, -np.inf)
        front = surface > depth
        depth[front], along[front] = surface[front], share[front] * length
        normal[front] = np.stack([away[..., 0], -away[..., 1], up], -1)[front]
    across = (offset[..., 0] * axis[1] - offset[..., 1] * axis[0]) / max(length, 1e-6) / capsule.radius
    return _Hit(depth, along, across, normal)


class _Canvas:
    """Colours and the depth of what is in front, at ``_SAMPLES`` a pixel's side."""

    def __init__(self, side: int) -> None:
        self.size = side * _SAMPLES
        self.colour = np.zeros((self.size, self.size, 3))
        self.depth = np.full((self.size, self.size), -np.inf)

    def places(self, low: np.ndarray, high: np.ndarray) -> tuple[tuple[slice, slice], np.ndarray]:
        """The part of the canvas between two corners in pixels, and the places of its samples ``[h, w, 2]``."""
        first = np.clip(np.floor(low * _SAMPLES), 0, self.size).astype(int)
        last = np.clip(np.ceil(high * _SAMPLES), 0, self.size).astype(int)
        (x, y) = ((np.arange(a, b) + 0.5) / _SAMPLES for a, b in zip(first, last, strict=True))
        return (slice(first[1], last[1]), slice(first[0], last[0])), np.stack(np.meshgrid(x, y), -1)

    def draw(self, capsule: _Capsule, pattern: _Pattern) -> None:
        """A capsule, shaded, where it is in front."""
        ends = np.stack([capsule.start, capsule.end])[:, :2]
        part, places = self.places(ends.min(0) - capsule.radius, ends.max(0) + capsule.radius)
        hit = _meet(capsule, places)
        front = hit.depth > self.depth[part]
        shade = 0.45 + 0.55 * np.clip(hit.normal @ _LIGHT, 0, 1)
        colours = _patterned(pattern, hit.along / capsule.radius, hit.across) * shade[..., None]
        self.colour[part][front], self.depth[part][front] = colours[front], hit.depth[front]


def _pattern(rng: np.random.Generator) -> _Pattern:
    first, second = rng.uniform(0.05, 1.0, (2, 3))
    return _Pattern(first, second, int(rng.integers(4)), rng.uniform(0.35, 1.2))


def _patterned(pattern: _Pattern, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    if pattern.kind == 0:
        return np.broadcast_to(pattern.first, (*u.shape, 3))
    stripes = np.floor(u / pattern.width), np.floor(v / pattern.width + 0.5)
    odd = (stripes[0] + stripes[1] if pattern.kind == 3 else stripes[pattern.kind - 1]) % 2 == 1
    return np.where(odd[..., None], pattern.first, pattern.second)


def _background(side: int, rng: np.random.Generator) -> np.ndarray:
    """A gradient between two colours with noise of three scales."""
    size = side * _SAMPLES
    across = (np.arange(size) + 0.5) / size
    angle = rng.uniform(0, 2 * np.pi)
    ramp = 0.5 + (np.cos(angle) * (across[None] - 0.5) + np.sin(angle) * (across[:, None] - 0.5)) / np.sqrt(2)
    first, second = rng.uniform(0.1, 0.95, (2, 3))
    colours = first + ramp[..., None] * (second - first)
    for cells in (4, 11, 31):
        grid = rng.normal(0, rng.uniform(0.02, 0.1), (cells + 1, cells + 1, 3))
        places = across * cells
        whole = np.minimum(places.astype(int), cells - 1)
        part = (places - whole)[:, None, None]
        rows = grid[whole] * (1 - part) + grid[whole + 1] * part
        part = part.transpose(1, 0, 2)
        colours = colours + rows[:, whole] * (1 - part) + rows[:, whole + 1] * part
    return colours


def _put_clutter(canvas: _Canvas, side: int, rng: np.random.Generator) -> None:
    """Boxes, and limbs that belong to nobody."""
    for _ in range(int(rng.integers(2, 7))):
        low, extent = rng.uniform(-0.2, 0.9, 2) * side, rng.uniform(0.1, 0.5, 2) * side
        part, places = canvas.places(low, low + extent)
        scale = 0.06 * side
        canvas.colour[part] = _patterned(_pattern(rng), places[..., 0] / scale, places[..., 1] / scale)
    for _ in range(int(rng.integers(2, 7))):
        start, angle, length = rng.uniform(0, side, 2), rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.35) * side
        end = start + length * np.array([np.cos(angle), np.sin(angle)])
        canvas.depth[:] = -np.inf
        limb = _Capsule(np.append(start, 0.0), np.append(end, 0.0), rng.uniform(0.015, 0.06) * side, 0)
        canvas.draw(limb, _pattern(rng))


def _put_face(canvas: _Canvas, body: _Body) -> None:
    """Dark eyes, a bright nose and ears of another colour, where the head's own surface is in front."""
    thick = 0.55 * body.radii[0]
    for number, colour in enumerate(
        ((0.95, 0.8, 0.3), (0.05, 0.05, 0.1), (0.05, 0.05, 0.1), (0.6, 0.2, 0.3), (0.6, 0.2, 0.3))
    ):
        centre = body.joints[number]
        part, places = canvas.places(centre[:2] - thick, centre[:2] + thick)
        near = ((places - centre[:2]) ** 2).sum(-1) <= thick**2
        near &= canvas.depth[part] - centre[2] < _COVERED * body.radii[number]
        canvas.colour[part][near] = colour
