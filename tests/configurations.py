"""Random configurations of the public ops, each from the op's name and a number alone.

A configuration is a contract case: shapes with 0 and 1 and at the edges of tiles, any strides and storage offsets,
optional tensors that are given but empty, int32 ids, ties, -inf, NaN, infinity and huge values; some of its gradients,
some of its outputs used.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import mimkernels
from mimkernels.ops.attention.spec import STATISTICS
from mimkernels.testing import Case, doubled
from tests.cases import token_ids

# Beside the sizes at which kernels change their way: nothing, one, odd sizes, and what tiles end at.
FEW = (0, 1, 1, 2, 3, 5, 8)
TOKENS = (0, 1, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 49, 50, 63, 64, 65)
LONG = (100, 127, 128, 129)
LONGER = (197, 256, 257, 511, 512, 513, 1025)
HEAD_DIMS = (8, 16, 24, 32, 40, 64, 64, 72, 80, 88, 96, 104, 112, 120, 128)
COLUMNS = (0, 1, 2, 3, 7, 8, 9, 16, 24, 31, 32, 33, 37, 64, 65, 127, 128, 129)
WIDE = (192, 255, 384, 768, 1100)

HUGE = {torch.float32: 1e15, torch.bfloat16: 1e15, torch.float16: 1e3}  # their squares and sums are still finite
LOGITS = 300.0  # times a normal number: about the largest scores of attention that leave more than one key its weight
VANISHED = 1e-37  # a weight below it may be 0 in fp32
Make = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True)
class Configuration(Case):
    """A case whose tensors lie anyhow in memory, and of whose outputs some are not used."""

    after: Callable[[dict], dict] | None = None  # inputs that follow from the others as they then are
    notes: str = ""  # what is special about the numbers
    non_finite: bool = False  # whether some inputs are NaN or infinite
    draws: int = 12  # small shapes are many here, and of few numbers the plain error is right by luck more often

    def inputs(self, dtype, device="cpu", layout="contiguous", seed=0):
        made = super().inputs(dtype, device, layout, seed)
        rng = random.Random(f"{self} layout")
        for name, value in made.items():
            if isinstance(value, Tensor):
                made[name] = arranged(value, rng)
        return made if self.after is None else {**made, **self.after(made)}

    def upstream(self, name, out, dtype, generator):
        rng = random.Random(f"{self} upstream of {name}")
        made = super().upstream(name, out, dtype, generator)
        return None if rng.random() < 0.15 else arranged(made, rng)


def arranged(value: Tensor, rng: random.Random) -> Tensor:
    """The same numbers with other strides or another offset, or one of them repeated; NaN lies in between."""
    kind = rng.choice(("as made", "as made", "rows apart", "permuted", "offset", "repeated", "steps", "free strides"))
    if value.dim() == 0 or kind == "as made":
        return value
    *outer, last = value.shape
    if kind == "rows apart":
        return _within((*outer, last + rng.randint(1, 9)), value, (..., slice(last)))
    if kind == "steps":
        return _within((*outer, last * 2), value, (..., slice(None, None, 2)))
    if kind == "permuted":
        order = rng.sample(range(value.dim()), value.dim())
        return value.permute(order).contiguous().permute([order.index(dim) for dim in range(value.dim())])
    if kind == "repeated":
        dim = rng.randrange(value.dim())
        return value.narrow(dim, 0, 1).expand(value.shape) if value.shape[dim] else value
    if kind == "offset":
        before = rng.randint(1, 9)
        return _within((before + value.numel(),), value.reshape(-1), (slice(before, None),)).view(value.shape)
    # torch allows a dimension of size 1 any stride.
    value = value.contiguous()
    strides = [
        rng.choice((0, 1, 7, 1000)) if size == 1 else step
        for size, step in zip(value.shape, value.stride(), strict=True)
    ]
    return value.as_strided(value.shape, strides)


def _within(shape: tuple[int, ...], value: Tensor, where: tuple) -> Tensor:
    wide = torch.full(shape, math.nan if value.is_floating_point() else 1, device=value.device).to(value.dtype)
    wide[where] = value
    return wide[where]


class Draw:
    """The choices of one configuration; ``small``: of a backend that takes seconds for what others do at once."""

    def __init__(self, seed: str, small: bool) -> None:
        self.rng = random.Random(seed)
        self.small = small
        self.dtype = self.rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
        self.special = self.rng.random() < 0.2  # one input may have values that are not finite
        self.non_finite = False
        self.notes: list[str] = []

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def of(self, *choices):
        return self.rng.choice(choices)

    def few(self) -> int:
        return self.of(*FEW[:6]) if self.small else self.of(*FEW)

    def tokens(self) -> int:
        if self.chance(0.06 if self.small else 0.15):
            return self.of(*LONG)
        if not self.small and self.chance(0.05):
            return self.of(*LONGER)
        return self.of(*TOKENS)

    def columns(self) -> int:
        return self.of(*WIDE) if not self.small and self.chance(0.15) else self.of(*COLUMNS)

    def ids(self, *shape: int, tokens: int) -> Make:
        """int32 or int64 ids, without repetition where there are enough tokens."""
        repeated, dtype = self.chance(0.3) or shape[-1] > tokens, self.of(torch.int64, torch.int32)
        if repeated:
            return lambda g: torch.randint(max(1, tokens), shape, generator=g).to(dtype)
        return lambda g: token_ids(g, *shape, tokens=tokens).to(dtype)

    def mask(self, batch: int, tokens: int) -> Make:
        ratio, hidden = self.of(0.0, 0.3, 0.7, 1.1), self.rng.randrange(batch) if batch and self.chance(0.3) else None

        def make(g):
            mask = torch.rand(batch, tokens, generator=g) < ratio
            if hidden is not None:
                mask[hidden] = False
            return mask

        return make

    def values(
        self, *shape: int, most: float = math.inf, flat: bool = True, wild: tuple = (math.nan, math.inf, -math.inf)
    ) -> Make:
        """Normal numbers, or such as meet the limits of the dtype; ``wild``: one of these here and there.

        ``flat``: also all the same, where a result that is then exactly 0 need not come out as 0 in 16 bits.
        """
        kind = self.of(*("normal",) * 8, "wide", "equal", "huge", "whole", "zero")
        kind = "normal" if kind in ("equal", "zero") and not flat else kind
        count = 0
        if wild and self.special and not self.non_finite and self.chance(0.5):
            self.non_finite, value, count = True, self.of(*wild), self.of(1, 1, 2, 20)
            self.notes.append(f"{count} x {value} in {shape}")
        if kind != "normal":
            self.notes.append(f"{kind} {shape}")
        scale = min(most, {"wide": 30.0, "huge": HUGE[self.dtype]}.get(kind, 1.0))

        def make(g):
            made = torch.randn(shape, generator=g) * scale
            if kind == "whole":
                made = made.round()  # ties
            if kind in ("equal", "zero"):
                made = torch.full(shape, 1.0) * (torch.randn((), generator=g) if kind == "equal" else 0.0)
            if count and made.numel():
                made.view(-1)[torch.randint(made.numel(), (count,), generator=g)] = value
            return made

        return make

    def some(self, *names: str) -> tuple[str, ...]:
        """Which inputs get gradients: all, some or none."""
        return names if self.chance(0.5) else tuple(name for name in names if self.chance(0.5))

    def case(self, arguments: dict, grads: tuple[str, ...] = (), **more) -> dict:
        """Arguments of a configuration; what is callable in the op's arguments is drawn from its generator."""

        def make(g):
            return {name: value(g) if callable(value) else value for name, value in arguments.items()}

        notes = {"notes": "; ".join(self.notes), "non_finite": self.non_finite}
        return {"make": make, "grads": grads, "dtypes": (self.dtype,), **notes, **more}

    def wide_parameter(self, name: str) -> tuple[str, ...]:
        """The name, if that input is fp32 beside half-precision others."""
        return (name,) if self.chance(0.3) else ()


# ---- attention ----


def _bias(draw: Draw, batch: int, heads: int, queries: int, keys: int):
    shape = (draw.of(1, heads), queries, keys)
    if draw.chance(0.5):
        shape = (draw.of(1, batch), *shape)
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


def _scores(draw: Draw, cross: bool):
    """Sizes, and the arguments that all ops of attention share."""
    batch, heads = draw.of(0, 1, 1, 1, 2, 2, 3), draw.of(1, 1, 2, 2, 3, 4)
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
    return (batch, heads, queries, keys, dim), arguments


def _statistics(draw: Draw, batch: int, tokens: int, keys: int):
    wanted = [name for name in STATISTICS if draw.chance(0.3)]
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


def _nan(options: dict) -> tuple[float, ...]:
    """NaN, where no key is hidden: whether a hidden key's reaches the output is nobody's promise."""
    return () if options["key_mask"] else (math.nan,)


def attention(draw: Draw) -> dict:
    (batch, heads, queries, keys, dim), options = _scores(draw, cross=draw.chance(0.3))
    wild = _nan(options)
    tensors = {
        "q": draw.values(batch, heads, queries, dim, most=LOGITS, wild=wild),
        "k": draw.values(batch, heads, keys, dim, most=1.0, flat=False, wild=wild),
        "v": draw.values(batch, heads, keys, dim, wild=wild),
    }
    options |= _statistics(draw, batch, queries, keys)
    parameters = ("positions", *draw.wide_parameter("bias"))
    # With one key P is 1, whatever its score: gradients that are 0 here come out as the rounding of a difference.
    names = ("q", "k", "v", "bias") if keys != 1 else ("v",)
    return draw.case({**tensors, **options}, draw.some(*names), parameters=parameters)


def attention_qkvpacked(draw: Draw) -> dict:
    (batch, heads, tokens, _, dim), options = _scores(draw, cross=False)
    options |= _statistics(draw, batch, tokens, tokens)
    parameters = ("positions", *draw.wide_parameter("bias"))
    arguments = {"qkv": draw.values(batch, tokens, 3, heads, dim, most=5.0, flat=False, wild=_nan(options)), **options}
    return draw.case(arguments, draw.some("qkv", "bias") if tokens != 1 else (), parameters=parameters)


def _companion(draw: Draw) -> dict:
    (batch, heads, queries, keys, dim), options = _scores(draw, cross=draw.chance(0.3))
    tensors = {
        "q": draw.values(batch, heads, queries, dim, most=30.0, wild=()),
        "k": draw.values(batch, heads, keys, dim, most=1.0, wild=()),
    }

    def lse(inputs):
        exact = doubled({name: value for name, value in inputs.items() if name != "lse"})
        return {"lse": mimkernels.attention(**exact, v=exact["k"], backend="reference").lse.float()}

    return draw.case({**tensors, "lse": None, **options}, parameters=draw.wide_parameter("bias"), after=lse)


# ---- tokens ----


def gather_tokens(draw: Draw) -> dict:
    batch, tokens, dim = draw.few(), draw.tokens(), draw.columns()
    keep = draw.of(0, 1, tokens, min(tokens, draw.tokens()), tokens // 4) if tokens else 0
    masks = draw.of((), (), (), (1,), (3,), (0,))
    leading = draw.of((), (1,))
    arguments = {
        "x": draw.values(batch, tokens, dim),
        "ids": draw.ids(*masks, batch, keep, tokens=tokens),
        "pos": draw.values(*leading, tokens, dim) if draw.chance(0.5) else None,
        "prefix": draw.values(*leading, draw.of(0, 1, 1, 2, 5), dim) if draw.chance(0.5) else None,
    }
    return draw.case(arguments, draw.some("x", "pos", "prefix"))


def restore_tokens(draw: Draw) -> dict:
    batch, tokens, dim = draw.few(), draw.tokens(), draw.columns()
    keep, num_prefix = draw.of(0, tokens, draw.rng.randint(0, tokens)), draw.of(0, 0, 1, 2)
    leading = draw.of((), (1,))
    arguments = {
        "x": draw.values(batch, num_prefix + keep, dim),
        "ids_restore": draw.ids(batch, tokens, tokens=tokens),
        "mask_token": draw.values(*draw.of((), (1, 1)), dim),
        "pos": draw.values(*leading, num_prefix + tokens, dim) if draw.chance(0.5) else None,
        "num_prefix": num_prefix,
    }
    return draw.case(arguments, draw.some("x", "mask_token", "pos"))


def fill_mask_tokens(draw: Draw) -> dict:
    batch, tokens, dim = draw.few(), draw.tokens(), draw.columns()
    mask, dtype = draw.mask(batch, tokens), draw.of(torch.bool, torch.int64, torch.int32, torch.float32, torch.uint8)
    arguments = {
        "x": draw.values(batch, tokens, dim),
        "mask": lambda g: mask(g).to(dtype),
        "mask_token": draw.values(*draw.of((), (1, 1)), dim),
    }
    return draw.case(arguments, draw.some("x", "mask_token"))


def bias_gelu(draw: Draw) -> dict:
    shape = [draw.of(draw.few(), draw.tokens()) for _ in range(draw.of(0, 1, 1, 2, 2, 3))]
    columns = draw.columns()
    while math.prod(shape) * columns > 2**17:
        shape[shape.index(max(shape))] = 1
    arguments = {
        "x": draw.values(*shape, columns),
        "bias": draw.values(columns) if draw.chance(0.7) else None,
        "approximate": draw.of("none", "tanh"),
    }
    return draw.case(arguments, draw.some("x", "bias"), parameters=draw.wide_parameter("bias"))


# ---- images ----


def _pixels(draw: Draw):
    """Patch and image sizes, and how the pixels are normalised."""
    patch = [draw.of(1, 2, 3, 4, 4, 5, 8) for _ in range(2)]
    if draw.chance(0.2):
        patch = [draw.of(8, 14, 16, 16)] * 2
    if draw.chance(0.25):
        patch = [draw.of(1, 2), *patch]
    grid = [draw.of(1, 1, 2, 3, 5) for _ in patch]
    if draw.chance(0.08):
        grid[draw.rng.randrange(len(grid))] = 0
    channels = draw.of(0, 1, 2, 3, 3, 3, 4)
    uint8 = draw.chance(0.3)
    mean = std = None
    if uint8 or draw.chance(0.4):
        mean, std = ([round(draw.rng.uniform(0.2, 0.6), 2) for _ in range(channels)] for _ in range(2))
    size = (draw.of(0, 1, 1, 2, 3), channels, *(side * count for side, count in zip(patch, grid, strict=True)))
    images = (
        (lambda g: torch.randint(256, size, generator=g, dtype=torch.uint8))
        if uint8
        else draw.values(*size)
        if draw.chance(0.3)
        else (lambda g: torch.rand(size, generator=g))
    )
    given = patch[0] if len(set(patch)) == 1 and draw.chance(0.7) else tuple(patch)
    pixels, tokens = channels * math.prod(patch), math.prod(grid)
    return size[0], tokens, pixels, {"images": images, "patch_size": given, "mean": mean, "std": std}


def patchify_gather(draw: Draw) -> dict:
    batch, tokens, _, arguments = _pixels(draw)
    masks = draw.of((), (), (), (1,), (3,), (0,))
    keep = draw.of(0, 1, tokens, draw.rng.randint(0, tokens)) if tokens else 0
    arguments["ids"] = draw.ids(*masks, batch, keep, tokens=tokens) if draw.chance(0.8) else None
    arguments["dtype"] = draw.of(None, None, torch.float32, torch.bfloat16, torch.float16)
    whole = arguments["images"](torch.Generator()).dtype == torch.uint8
    return draw.case(arguments, () if whole else draw.some("images"), parameters=draw.wide_parameter("images"))


def masked_patch_loss(draw: Draw) -> dict:
    batch, tokens, pixels, arguments = _pixels(draw)
    rows = tokens
    if draw.chance(0.5):
        rows = draw.of(0, 1, tokens, draw.rng.randint(0, tokens)) if tokens else 0
        arguments["ids"] = draw.ids(batch, rows, tokens=tokens)
    else:
        mask, dtype = draw.mask(batch, tokens), draw.of(torch.bool, torch.int64, torch.float32)
        arguments["mask"] = lambda g: mask(g).to(dtype)
    arguments |= {
        "pred": draw.values(batch, rows, pixels),
        "norm_pix": draw.chance(0.5),
        "kind": draw.of("mse", "mse", "l1", "smooth_l1"),
        "beta": draw.of(1.0, 0.5, 1e-3),
        "layout": draw.of("channels_last", "channels_first"),
        "reduction": draw.of("mean", "none"),
    }
    draws = 48 if arguments["reduction"] == "mean" else 12
    return draw.case(arguments, draw.some("pred"), parameters=draw.wide_parameter("images"), draws=draws)


# ---- pooling ----


def _pooled(draw: Draw):
    batch, tokens, dim = draw.few(), draw.tokens(), draw.columns()
    options = {
        "mask": draw.mask(batch, tokens) if draw.chance(0.5) else None,
        "num_prefix": min(tokens, draw.of(0, 0, 1, 2, tokens)),
    }
    return (batch, tokens, dim), options


def _without_infinity_where_weights_vanish(op: str, pooled: str) -> Callable[[dict], dict]:
    """NaN for the infinite numbers of an image of whose softmax some weight may be 0 in fp32, but is not in fp64.

    Infinity times 0 is NaN, and infinite times a weight that is not 0: plain PyTorch in fp32 differs from the oracle,
    and where weights become 0 is nobody's promise. Weights that are 0 in both (of scores of -inf) stay beside infinity.
    """

    def after(inputs):
        values = inputs[pooled]
        if values is None or not values.isinf().any():
            return {}
        exact = {**doubled(inputs), "return_weights": True}
        _, weights = getattr(mimkernels, op)(**exact, backend="reference")
        vanish = ((weights > 0) & (weights < VANISHED)).flatten(1).any(1)
        return {pooled: values.masked_fill(values.isinf() & vanish[:, None, None], math.nan)} if vanish.any() else {}

    return after


def query_pool(draw: Draw) -> dict:
    (batch, tokens, dim), options = _pooled(draw)
    groups = draw.of(0, 1, 1, 2, 3, 4, 8, 12, 33)
    width = draw.of(None, None, draw.columns())
    columns = dim if width is None else width
    sliced = groups > 0 and columns % groups == 0 and draw.chance(0.4)
    arguments = {
        "x": draw.values(batch, tokens, dim),
        "queries": draw.values(*draw.of((), (batch,)), groups, dim),
        "values": None if width is None else draw.values(batch, tokens, width),
        "scale": draw.of(None, None, 1.0, 0.1, 0.0) if dim else 1.0,
        "sliced": sliced,
        "return_weights": draw.chance(0.5),
    }
    after = _without_infinity_where_weights_vanish("query_pool", "values")
    return draw.case({**arguments, **options}, draw.some("queries", "x", "values"), after=after)


def weighted_pool(draw: Draw) -> dict:
    (batch, tokens, dim), options = _pooled(draw)
    groups = draw.of((), (0,), (1,), (2,), (6,), (33,))
    arguments = {
        "x": draw.values(batch, tokens, dim),
        "scores": draw.values(batch, *groups, tokens),
        "normalize": draw.chance(0.7),
        "return_weights": draw.chance(0.5),
    }
    grads, parameters = draw.some("x", "scores"), draw.wide_parameter("scores")
    after = _without_infinity_where_weights_vanish("weighted_pool", "x") if arguments["normalize"] else None
    return draw.case({**arguments, **options}, grads, parameters=parameters, after=after)


def reduce_pool(draw: Draw) -> dict:
    (batch, tokens, dim), options = _pooled(draw)
    # Of the exponents 1, 2 and 1/2 torch makes products and roots, which are more exact than any power.
    kind, power = draw.of("mean", "max", "gem", "gem"), draw.of(1.5, 2.5, 3.0, 4.0)
    number = kind == "gem" and draw.chance(0.3)
    arguments = {
        "x": draw.values(batch, tokens, dim, **({"most": 30.0, "flat": False} if kind == "gem" else {})),
        "kind": kind,
        "p": power if number else lambda g: torch.full((1,), power),
        "eps": draw.of(1e-6, 1e-6, 0.5),
    }
    grads = draw.some("x")  # the gradient of p is one number, too small a sample of the plain error
    return draw.case({**arguments, **options}, grads, parameters=("p",))


# ---- masks ----


def random_mask(draw: Draw) -> dict:
    tokens = max(1, draw.tokens())
    arguments = {
        "batch": draw.few(),
        "tokens": tokens,
        "keep": draw.of(1, tokens, draw.rng.randint(1, tokens)),
        "seed": draw.of(0, 7, draw.rng.randrange(2**63)),
        "offset": draw.of(0, 5, draw.rng.randrange(2**63), lambda g: torch.randint(2**40, (), generator=g)),
        "order": draw.of("shuffle", "sorted"),
        "device": None,
    }
    return draw.case(arguments)


def mask_from_noise(draw: Draw) -> dict:
    tokens = max(1, draw.tokens())
    arguments = {
        "noise": draw.values(draw.few(), tokens),
        "keep": draw.of(1, tokens, draw.rng.randint(1, tokens)),
        "order": draw.of("shuffle", "sorted"),
    }
    return draw.case(arguments)


OPS: dict[str, Callable[[Draw], dict]] = {
    "attention": attention,
    "attention_qkvpacked": attention_qkvpacked,
    "received_attention": _companion,
    "head_divergence": _companion,
    "gather_tokens": gather_tokens,
    "restore_tokens": restore_tokens,
    "fill_mask_tokens": fill_mask_tokens,
    "bias_gelu": bias_gelu,
    "patchify_gather": patchify_gather,
    "masked_patch_loss": masked_patch_loss,
    "query_pool": query_pool,
    "weighted_pool": weighted_pool,
    "reduce_pool": reduce_pool,
    "random_mask": random_mask,
    "mask_from_noise": mask_from_noise,
}


def configuration(op: str, number: int, small: bool, dtype: torch.dtype | None = None) -> Configuration:
    """The configuration of that number; another one for backends that take small shapes only, or of a given dtype."""
    draw = Draw(f"{op} {number} {'small' if small else ''}", small)
    draw.dtype = dtype or draw.dtype
    made = OPS[op](draw)
    return Configuration(op=op, label=str(number), **made)
