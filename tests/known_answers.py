"""What the definitions of several ops share, in loops over numbers, and the comparison with the reference.

``definition`` of ``tests/ops/<op>/test_known_answers.py`` is its op, written out: the arguments as nested lists or
numbers in, outputs by name out. The fp64 oracle of the contract rests on these.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from mimkernels import testing
from tests.cases import rich


def assert_the_reference_is(definition: Callable[..., dict], op: str) -> None:
    """Fail unless the reference of the op, in fp64, gives what the definition says."""
    inputs = rich(op).inputs(torch.float64)
    plain = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    expected = definition(**plain)
    outputs = testing.call(rich(op), inputs, "reference")
    assert outputs.keys() == expected.keys()
    rtol = 1e-7 if inputs.get("mean") else 1e-10  # the constants of the normalisation are fp32
    for name, value in outputs.items():
        exact = torch.tensor(expected[name], dtype=torch.float64)
        torch.testing.assert_close(value.double(), exact, rtol=rtol, atol=rtol)


def softmax(scores):
    most = max(scores)
    if most == -math.inf:
        return [0.0] * len(scores)
    weights = [math.exp(score - most) for score in scores]
    return [weight / sum(weights) for weight in weights]


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def probabilities(q, k, scale=None, **others):
    """P of one head."""
    assert all(value is None for name, value in others.items() if name in ("bias", "key_mask"))
    scale = len(q[0]) ** -0.5 if scale is None else scale
    return [softmax([scale * dot(row, key) for key in k]) for row in q]


def entropy(weights):
    return -math.fsum(p * math.log(p) for p in weights if p > 0)


def of_heads(function, *tensors):
    """A function of one head, over images and heads."""
    return [[function(*head) for head in zip(*image, strict=True)] for image in zip(*tensors, strict=True)]


def patches(image, side, mean, std):
    """Of ``[C, H, W]``, row by row: channels of rows of normalised pixels."""
    rows, columns = len(image[0]) // side, len(image[0][0]) // side
    return [
        [
            [[(image[c][r * side + y][s * side + x] - mean[c]) / std[c] for x in range(side)] for y in range(side)]
            for c in range(len(image))
        ]
        for r in range(rows)
        for s in range(columns)
    ]


def pooled(weights, image):
    return [dot(weights, column) for column in zip(*image, strict=True)]


def philox(counter, key):
    """Philox4x32-10 of Salmon et al., SC 2011, on Python's integers."""
    word = 2**32
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b // word ^ c[1] ^ k[0], b % word, a // word ^ c[3] ^ k[1], a % word]
        k = [(k[0] + 0x9E3779B9) % word, (k[1] + 0xBB67AE85) % word]
    return c


def masks(noise, keep):
    """Kept, masked and restore ids and the mask, from the order of the noise."""
    shuffled = [sorted(range(len(row)), key=lambda i, row=row: row[i]) for row in noise]  # stable
    restore = [[row.index(i) for i in range(len(row))] for row in shuffled]
    return {
        "ids_keep": [row[:keep] for row in shuffled],
        "ids_masked": [row[keep:] for row in shuffled],
        "ids_restore": restore,
        "mask": [[float(rank >= keep) for rank in row] for row in restore],
    }
