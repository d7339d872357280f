"""Every op against its definition, written out in loops over numbers: what the fp64 oracle of the contract rests on."""

import math

import pytest
import torch

from tests.cases import RICH, WITHOUT_KERNELS, rich

ANSWERS = {}


def answer(function):
    """A definition by the name of its op: the arguments as nested lists or numbers in, outputs by name out."""
    ANSWERS[function.__name__] = function
    return function


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


@answer
def attention(q, k, v, num_prefix, positions, stats, **others):
    scale = len(q[0][0][0]) ** -0.5
    p = of_heads(lambda a, b: probabilities(a, b, **others), q, k)
    columns = of_heads(lambda head: list(zip(*head, strict=True)), v)
    made = {
        "out": of_heads(lambda head, values: [[dot(row, c) for c in values] for row in head], p, columns),
        "lse": of_heads(
            lambda a, b: [math.log(math.fsum(math.exp(scale * dot(row, key)) for key in b)) for row in a], q, k
        ),
    }

    def distance(i, j):
        return 0.0 if min(i, j) < num_prefix else math.dist(positions[i - num_prefix], positions[j - num_prefix])

    of_row = {
        "entropy": lambda i, row: entropy(row),
        "prefix_mass": lambda i, row: math.fsum(row[:num_prefix]),
        "self_mass": lambda i, row: row[i],
        "distance": lambda i, row: math.fsum(weight * distance(i, j) for j, weight in enumerate(row)),
        "patch_entropy": lambda i, row: entropy([weight / math.fsum(row[num_prefix:]) for weight in row[num_prefix:]]),
        "peak": lambda i, row: max(row),
        "patch_mass": lambda i, row: math.fsum(row[num_prefix:]),
    }
    for name in stats:
        made[name] = of_heads(lambda head, name=name: [of_row[name](i, row) for i, row in enumerate(head)], p)
    return made


@answer
def attention_qkvpacked(qkv, **others):
    q, k, v = (
        [[[token[part][h] for token in image] for h in range(len(image[0][part]))] for image in qkv]
        for part in range(3)
    )
    return attention(q, k, v, **others)


@answer
def received_attention(q, k, lse, **others):
    p = of_heads(lambda a, b: probabilities(a, b, **others), q, k)
    return {"output": of_heads(lambda head: [math.fsum(c) / len(head) for c in zip(*head, strict=True)], p)}


@answer
def head_divergence(q, k, lse, **others):
    def mean(one, other):
        pairs = [list(zip(a, b, strict=True)) for a, b in zip(one, other, strict=True)]
        return math.fsum(x * math.log(x / y) for row in pairs for x, y in row) / len(pairs)

    p = of_heads(lambda a, b: probabilities(a, b, **others), q, k)
    return {"output": [[[mean(one, other) for other in image] for one in image] for image in p]}


@answer
def gather_tokens(x, ids, pos, prefix):
    def token(image, i):
        return [a + b for a, b in zip(image[i], pos[i], strict=True)]

    return {"output": [prefix + [token(image, i) for i in kept] for image, kept in zip(x, ids, strict=True)]}


@answer
def restore_tokens(x, ids_restore, mask_token, pos, num_prefix):
    made = []
    for image, restore in zip(x, ids_restore, strict=True):
        kept = image[num_prefix:]
        tokens = image[:num_prefix] + [kept[i] if i < len(kept) else mask_token for i in restore]
        made.append([[a + b for a, b in zip(*pair, strict=True)] for pair in zip(tokens, pos, strict=True)])
    return {"output": made}


@answer
def fill_mask_tokens(x, mask, mask_token):
    pairs = (zip(*image, strict=True) for image in zip(x, mask, strict=True))
    return {"output": [[mask_token if hidden else token for token, hidden in image] for image in pairs]}


@answer
def bias_gelu(x, bias):
    def gelu(value):
        return value * 0.5 * math.erfc(-value / math.sqrt(2))

    return {"output": [[[gelu(a + b) for a, b in zip(row, bias, strict=True)] for row in image] for image in x]}


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


@answer
def patchify_gather(images, ids, patch_size, mean, std, dtype):
    made = []
    for image, kept in zip(images, ids, strict=True):
        cut = patches(image, patch_size, mean, std)
        made.append([[pixel for channel in cut[i] for row in channel for pixel in row] for i in kept])
    return {"output": made}


@answer
def masked_patch_loss(pred, images, ids, patch_size, mean, std, norm_pix):
    assert norm_pix
    losses = []
    for image, rows, kept in zip(images, pred, ids, strict=True):
        cut = patches(image, patch_size, mean, std)
        for predicted, i in zip(rows, kept, strict=True):
            pixels = [[row[x] for row in channel for x in range(patch_size)] for channel in cut[i]]
            target = [value for pixel in zip(*pixels, strict=True) for value in pixel]  # channels last
            middle = math.fsum(target) / len(target)
            variance = math.fsum((t - middle) ** 2 for t in target) / (len(target) - 1)
            target = [(t - middle) / math.sqrt(variance + 1e-6) for t in target]
            squares = [(a - b) ** 2 for a, b in zip(predicted, target, strict=True)]
            losses.append(math.fsum(squares) / len(squares))
    return {"output": math.fsum(losses) / len(losses)}


def pooled(weights, image):
    return [dot(weights, column) for column in zip(*image, strict=True)]


@answer
def query_pool(x, queries, values, mask, num_prefix, return_weights):
    assert values is None
    made = {"output": [], "weights": []}
    for image, allowed in zip(x, mask, strict=True):
        here = [ok and n >= num_prefix for n, ok in enumerate(allowed)]
        weights = [
            softmax([dot(q, t) * len(q) ** -0.5 if ok else -math.inf for t, ok in zip(image, here, strict=True)])
            for q in queries
        ]
        made["weights"].append(weights)
        made["output"].append([pooled(row, image) for row in weights])
    return made


@answer
def weighted_pool(x, scores, mask, num_prefix, return_weights):
    assert mask is None and num_prefix == 0
    weights = [softmax(row) for row in scores]
    return {"output": [pooled(row, image) for row, image in zip(weights, x, strict=True)], "weights": weights}


@answer
def reduce_pool(x, mask, p, kind, num_prefix):
    assert kind == "gem" and mask is None and num_prefix == 0
    (power,) = p

    def mean(column):
        return (math.fsum(max(value, 1e-6) ** power for value in column) / len(column)) ** (1 / power)

    return {"output": [[mean(column) for column in zip(*image, strict=True)] for image in x]}


def philox(counter, key):
    """Philox4x32-10 of Salmon et al., SC 2011, on Python's integers."""
    word = 2**32
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b // word ^ c[1] ^ k[0], b % word, a // word ^ c[3] ^ k[1], a % word]
        k = [(k[0] + 0x9E3779B9) % word, (k[1] + 0xBB67AE85) % word]
    return c


@answer
def random_mask(batch, tokens, keep, seed, offset, device):
    key, step = (seed % 2**32, seed // 2**32), (offset % 2**32, offset // 2**32)
    noise = [[philox((i // 4, b, *step), key)[i % 4] for i in range(tokens)] for b in range(batch)]
    return mask_from_noise(noise, keep)


@answer
def mask_from_noise(noise, keep):
    shuffled = [sorted(range(len(row)), key=lambda i, row=row: row[i]) for row in noise]  # stable
    restore = [[row.index(i) for i in range(len(row))] for row in shuffled]
    return {
        "ids_keep": [row[:keep] for row in shuffled],
        "ids_masked": [row[keep:] for row in shuffled],
        "ids_restore": restore,
        "mask": [[float(rank >= keep) for rank in row] for row in restore],
    }


def test_every_op_has_a_known_answer():
    assert ANSWERS.keys() == RICH.keys()
    assert set(WITHOUT_KERNELS) == {"attention_rows"}  # tests/ops/test_attention.py


@pytest.mark.parametrize("op", ANSWERS)
def test_the_reference_in_fp64_is_the_definition(op):
    from mimkernels import testing

    inputs = rich(op).inputs(torch.float64)
    plain = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    expected = ANSWERS[op](**plain)
    got = testing.call(rich(op), inputs, "reference")
    assert got.keys() == expected.keys()
    rtol = 1e-7 if inputs.get("mean") else 1e-10  # the constants of the normalisation are fp32
    for name, value in got.items():
        exact = torch.tensor(expected[name], dtype=torch.float64)
        torch.testing.assert_close(value.double(), exact, rtol=rtol, atol=rtol)
