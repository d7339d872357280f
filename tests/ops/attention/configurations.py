"""Random configurations of attention, and draws that its companions share."""

import math

import torch

import mimkernels
from mimkernels.ops.attention.spec import STATISTICS
from mimkernels.testing import doubled
from tests.configurations import Draw
from tests.ops.attention.cases import COMPARED

HEAD_DIMS = (8, 16, 24, 32, 40, 64, 64, 72, 80, 88, 96, 104, 112, 120, 128)
OF_SCORES = ("max_score", "argmax")
LOGITS = 300.0  # times a normal number: about the largest scores that leave more than one key its weight


def _bias(draw: Draw, batch: int, heads: int, queries: int, keys: int):
    shape = (draw.of(1, heads), queries, keys)
    if draw.chance(0.5):
        windows = [count for count in range(2, batch) if batch % count == 0]
        shape = (draw.of(1, batch, *windows), *shape)
    kind = draw.of("values", "values", "hides", "hides rows", "minimum", "minimum rows")
    if kind == "values":
        return draw.values(*shape, most=LOGITS, wild=())
    least = -math.inf if kind.startswith("hides") else draw.of(-1e4, -1e9, torch.finfo(draw.dtype).min)

    draw.notes.append(f"bias {kind} {least}")
    width = 1 if kind.endswith("rows") else keys

    def make(g):
        hidden = torch.rand(*shape[:-1], width, generator=g) < 0.4
        return torch.randn(shape, generator=g).masked_fill(hidden, least)

    return make


def _table(draw: Draw, heads: int, queries: int, keys: int) -> dict:
    # Of one entry the gradient is a sum of 0: the rounding of its terms, which backends of GPUs round more of.
    entries = draw.of(3 if draw.small else 1, 3, 17, 64, 200) if queries * keys else draw.of(0, 0, 5)
    return {
        "bias_table": draw.values(entries, heads, most=LOGITS, wild=()),
        "bias_index": draw.ids(queries, keys, tokens=entries),
    }


def scores(draw: Draw, cross: bool):
    """Sizes, and the arguments that all ops of attention share."""
    batch, heads = draw.of(0, 1, 1, 1, 2, 2, 3, 4, 6), draw.of(1, 1, 2, 2, 3, 4)
    queries = draw.tokens()
    keys = draw.tokens() if cross else queries
    dim = draw.of(*HEAD_DIMS)
    if draw.small or queries * keys > 2**14:
        batch, heads = min(batch, 2), min(heads, 2)
    arguments = {
        "bias": _bias(draw, batch, heads, queries, keys) if draw.chance(0.5) else None,
        "key_mask": draw.mask(batch, keys) if draw.chance(0.35) else None,
        "scale": draw.of(None, None, None, 0.3, 1.0, -0.2, 0.0),
    }
    if draw.chance(0.35):
        arguments |= _table(draw, heads, queries, keys)
    if draw.chance(0.25):
        arguments |= {"scale": None, "logit_scale": draw.values(heads, most=3.0, wild=())}
    return (batch, heads, queries, keys, dim), arguments


def statistics(draw: Draw, batch: int, tokens: int, keys: int):
    wanted = [name for name in STATISTICS if name not in OF_SCORES and draw.chance(0.3)]
    if tokens != keys:
        wanted = [name for name in wanted if name not in ("self_mass", "distance")]
    num_prefix = min(keys, draw.of(0, 0, 1, 1, 2, 5, keys))
    if num_prefix:
        # A difference of numbers of the size of log M, as its docstring says: where prefix keys take nearly all, the
        # kernels are a few roundings of those off, and the plain expression need not be.
        wanted = [name for name in wanted if name != "patch_entropy"]
    positions = None
    if "distance" in wanted or draw.chance(0.1):
        rows = draw.of(tokens, max(0, tokens - num_prefix))
        images = draw.of((), (), (1,), (batch,))
        dims = draw.of(1, 2, 2, 3)

        def positions(g):
            return torch.rand(*images, rows, dims, generator=g) * 14

    return {"num_prefix": num_prefix, "positions": positions, "stats": tuple(wanted)}


def of_scores(draw: Draw) -> tuple[str, ...]:
    return tuple(name for name in OF_SCORES if draw.chance(0.3))


def wide_biases(draw: Draw) -> tuple[str, ...]:
    """Which biases are fp32 beside half-precision others."""
    return tuple(name for bias in ("bias", "bias_table", "logit_scale") for name in draw.wide_parameter(bias))


def nan_of(options: dict) -> tuple[float, ...]:
    """NaN, where no key is hidden: whether a hidden key's reaches the output is nobody's promise."""
    return () if options["key_mask"] else (math.nan,)


def companion(draw: Draw) -> dict:
    (batch, heads, queries, keys, dim), options = scores(draw, cross=draw.chance(0.3))
    tensors = {
        "q": draw.values(batch, heads, queries, dim, most=30.0, wild=()),
        "k": draw.values(batch, heads, keys, dim, most=1.0, wild=()),
    }

    def lse(inputs):
        exact = doubled({name: value for name, value in inputs.items() if name != "lse"})
        return {"lse": mimkernels.attention(**exact, v=exact["k"], backend="reference").lse.float()}

    return draw.case({**tensors, "lse": None, **options}, parameters=wide_biases(draw), after=lse)


def configuration(draw: Draw) -> dict:
    (batch, heads, queries, keys, dim), options = scores(draw, cross=draw.chance(0.3))
    wild = nan_of(options)
    tensors = {
        "q": draw.values(batch, heads, queries, dim, most=LOGITS, wild=wild),
        "k": draw.values(batch, heads, keys, dim, most=1.0, flat=False, wild=wild),
        "v": draw.values(batch, heads, keys, dim, wild=wild),
    }
    options |= statistics(draw, batch, queries, keys)
    parameters = ("positions", *wide_biases(draw))
    # With one key P is 1, whatever its score: gradients that are 0 here come out as the rounding of a difference.
    names = ("q", "k", "v", "bias", "bias_table", "logit_scale") if keys != 1 else ("v",)
    grads = draw.some(*names)
    options["stats"] += of_scores(draw)
    return draw.case({**tensors, **options}, grads, parameters=parameters, compared=COMPARED, varied={"k": 2})
