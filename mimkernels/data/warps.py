"""Known warps: an image seen a second time under a random similarity, affine map or homography, and where points go.

Points are ``(x, y)`` with the image's edges at -1 and 1, as ``torch.nn.functional.grid_sample`` takes them with
``align_corners=False``: of S pixels, the middle of pixel i is at ``(2 i + 1) / S - 1``.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("similarity", "affine", "homography")  # each adds to the one before

_ANGLE = np.pi / 6  # largest rotation
_ZOOM = 1.3  # largest factor, and inverse of the smallest
_SHIFT = 0.6  # largest shift along an axis: of half a side
_STRETCH, _SHEAR = 1.2, 0.2  # of affine maps: of one axis over the other, and of x by y
_TILT = 0.15  # of homographies: the distance to the picture changes so much from its middle to an edge
_AT_ONCE = 64  # images


def random_warps(count: int, seed: int) -> Tensor:
    """``[count, 3, 3]`` float64: maps of homogeneous points of an image to those of the image warped.

    Each is a similarity, an affine map or a homography, with equal chances. Warp i depends on the seed and i alone.
    """
    made = [_random_warp(np.random.default_rng((seed, i))) for i in range(count)]
    return torch.from_numpy(np.stack(made)) if made else torch.empty(0, 3, 3, dtype=torch.float64)


def _random_warp(rng: np.random.Generator) -> np.ndarray:
    kind = KINDS[rng.integers(len(KINDS))]
    angle, zoom = rng.uniform(-_ANGLE, _ANGLE), _ZOOM ** rng.uniform(-1, 1)
    cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
    warp = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    if kind != "similarity":
        stretch = np.sqrt(_STRETCH ** rng.uniform(-1, 1))
        warp = warp @ np.array([[stretch, rng.uniform(-_SHEAR, _SHEAR), 0.0], [0.0, 1 / stretch, 0.0], [0.0, 0.0, 1.0]])
    if kind == "homography":
        warp = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [*rng.uniform(-_TILT, _TILT, 2), 1.0]]) @ warp
    shift = np.eye(3)
    shift[:2, 2] = rng.uniform(-_SHIFT, _SHIFT, 2)
    return shift @ warp


def moved_points(warps: Tensor, points: Tensor) -> Tensor:
    """Where ``[n, Q, 2]`` or ``[Q, 2]`` points of n images are in the images warped: ``[n, Q, 2]`` float64."""
    homogeneous = F.pad(points.double(), (0, 1), value=1.0)  # [..., Q, 3]
    moved = homogeneous @ warps.double().transpose(1, 2)
    return moved[..., :2] / moved[..., 2:]


def warped_images(images: Tensor, warps: Tensor) -> Tensor:
    """``[n, C, S, S]`` uint8 images warped, by bilinear sampling; their mean colour is where they do not reach."""
    if len(images) != len(warps):
        raise ValueError(f"as many warps as images: {len(warps)} warps, {len(images)} images")
    height, width = images.shape[-2:]
    points = pixel_middles(height, width).view(-1, 2)
    parts = []
    for part, back in zip(images.split(_AT_ONCE), torch.linalg.inv(warps.double()).split(_AT_ONCE), strict=True):
        pixels = part.float()
        mean = pixels.mean((2, 3), keepdim=True)
        places = moved_points(back, points).view(-1, height, width, 2).float()
        sampled = F.grid_sample(pixels - mean, places, mode="bilinear", padding_mode="zeros", align_corners=False)
        parts.append((sampled + mean).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(parts) if parts else images.clone()


def pixel_middles(height: int, width: int) -> Tensor:
    """``[height, width, 2]`` float64: the points in the middles of pixels, or of patches."""
    y, x = ((2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1 for size in (height, width))
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1)
