"""Random configurations of the public ops, each from the op's name and a number alone.

``configuration`` of ``tests/ops/<op>/configurations.py`` draws the arguments of its op.

A configuration is a contract case: shapes with 0 and 1 and at the edges of tiles, any strides and storage offsets,
optional tensors that are given but empty, int32 ids, ties, -inf, NaN, infinity and huge values; some of its gradients,
some of its outputs used.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import mimkernels
from mimkernels.testing import Case, doubled
from tests.cases import ops_with, part_of
from tests.inputs import token_ids

# Beside the sizes at which kernels change their way: nothing, one, odd sizes, and what tiles end at.
FEW = (0, 1, 1, 2, 3, 5, 8)
TOKENS = (0, 1, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 49, 50, 63, 64, 65)
LONG = (100, 127, 128, 129)
LONGER = (197, 256, 257, 511, 512, 513, 1025)
COLUMNS = (0, 1, 2, 3, 7, 8, 9, 16, 24, 31, 32, 33, 37, 64, 65, 127, 128, 129)
WIDE = (192, 255, 384, 768, 1100)

HUGE = {torch.float32: 1e15, torch.bfloat16: 1e15, torch.float16: 1e3}  # their squares and sums are still finite
VANISHED = 1e-37  # a weight below it may be 0 in fp32
Make = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True)
class Configuration(Case):
    """A case whose tensors lie anyhow in memory, and of whose outputs some are not used."""

    after: Callable[[dict], dict] | None = None  # inputs that follow from the others as they then are
    notes: str = ""  # what is special about the numbers
    non_finite: bool = False  # whether some inputs are NaN or infinite
    draws: int = 12  # small shapes are many here, and of few numbers the plain error is right by luck more often
    varied: dict[str, int] = field(default_factory=dict, compare=False)  # along which dimension none is repeated

    def inputs(self, dtype, device="cpu", layout="contiguous", seed=0):
        made = super().inputs(dtype, device, layout, seed)
        rng = random.Random(f"{self} layout")
        for name, value in made.items():
            if isinstance(value, Tensor):
                made[name] = arranged(value, rng, self.varied.get(name))
        return made if self.after is None else {**made, **self.after(made)}

    def upstream(self, name, out, dtype, generator):
        rng = random.Random(f"{self} upstream of {name}")
        made = super().upstream(name, out, dtype, generator)
        return None if rng.random() < 0.15 else arranged(made, rng)


def arranged(value: Tensor, rng: random.Random, varied: int | None = None) -> Tensor:
    """The same numbers with other strides or another offset, or one of them repeated; NaN lies in between.

    Along the dimension `varied` none is repeated.
    """
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
        return value.narrow(dim, 0, 1).expand(value.shape) if value.shape[dim] and dim != varied else value
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

        ``flat``: also all the same, where a result that is then exactly 0 need not come out as 0 in 16 bits. Of an
        input that must not be, ``varied`` of the configuration says along which dimension.
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


# ---- what several ops share ----


def images_and_patches(draw: Draw):
    """Images, tokens, pixels of a patch, the grid of patches, and arguments: images, patches, normalisation."""
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
    return size[0], tokens, pixels, grid, {"images": images, "patch_size": given, "mean": mean, "std": std}


def tokens_to_pool(draw: Draw):
    batch, tokens, dim = draw.few(), draw.tokens(), draw.columns()
    options = {
        "mask": draw.mask(batch, tokens) if draw.chance(0.5) else None,
        "num_prefix": min(tokens, draw.of(0, 0, 1, 2, tokens)),
    }
    return (batch, tokens, dim), options


def without_infinity_where_weights_vanish(op: str, pooled: str) -> Callable[[dict], dict]:
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


OPS = ops_with("configurations")


def configuration(op: str, number: int, small: bool, dtype: torch.dtype | None = None) -> Configuration:
    """The configuration of that number; another one for backends that take small shapes only, or of a given dtype."""
    draw = Draw(f"{op} {number} {'small' if small else ''}", small)
    draw.dtype = dtype or draw.dtype
    return Configuration(op=op, label=str(number), **part_of(op, "configurations").configuration(draw))
