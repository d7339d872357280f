"""What the study trains: data, encoder, methods, budgets and the cells that they make.

Every setting was fixed before the first result was seen, and none of them is changed after one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

DATA = "fashion-mnist"
TRAIN_IMAGES, TEST_IMAGES = 5_000, 2_000  # of 60,000 and 10,000, drawn once
DATA_SEED = 0
ANALYZED_IMAGES = 1_000  # of the test images
SEEDS = (0, 1, 2)

ENCODER = {"embed_dim": 128, "depth": 6, "num_heads": 4}
IMG_SIZE, PATCH_SIZE = 28, 4
PATCHES = (IMG_SIZE // PATCH_SIZE) ** 2  # 49, and [cls]

# 13 epochs of the supervised baseline cost the encoder what 5 of MoCo v3 and 4 of DINO do, within 4 %.
EPOCHS = 13
BATCH_SIZE = 128
LR = (
    1e-3  # of AdamW at its peak, for every method; published ones are 0.8e-3 to 2.4e-3, of batches 8 to 32 times larger
)
WARMUP_SHARE = 0.1
MASK_RATIO = {"mae": 0.75, "simmim": 0.6}
LOCAL_CROPS, LOCAL_SIZE = 2, 16
MOMENTUM = 0.99  # of both averages: DINO's published 0.996 remembers 250 steps, more than its run has at equal FLOPs
HEAD_DIM = 1024  # hidden width of both projection heads, whose published ones would cost as much as this encoder

PROBE_EPOCHS, PROBE_BATCH_SIZE = 30, 128
READOUTS = ("cls", "mean", "abmilp", "ep")

BUDGETS = {"epochs": "equal epochs", "flops": "equal encoder FLOPs"}


@dataclass(frozen=True)
class Pass:
    """Passes of one image through an encoder: how many views, of how many tokens, and whether gradients flow back."""

    tokens: int
    views: int = 1
    backward: bool = True


def forward_flops(tokens: int) -> int:
    """Floating point operations of one view's forward pass; a multiplication and an addition are two.

    Per token of a block: 6 D^2 for queries, keys and values, 2 D^2 for the projection, 16 D^2 for the MLP of 4 D units;
    and 4 N D for scores and weighted values. Before them, the projection of the patches. Norms, softmax and GELU are
    left out.
    """
    dim, depth = ENCODER["embed_dim"], ENCODER["depth"]
    blocks = depth * (24 * tokens * dim**2 + 4 * tokens**2 * dim)
    return blocks + 2 * (tokens - 1) * PATCH_SIZE**2 * dim


@dataclass(frozen=True)
class Method:
    """A way of training the encoder.

    Attributes:
        name: as of ``mimkernels pretrain --method``.
        family: "MIM", "joint-embedding" or "supervised".
        passes: what the encoders do for one image of an epoch, those of momentum encoders included.
        options: further options of ``mimkernels pretrain``; what is not given has the library's default.
    """

    name: str
    title: str
    family: str
    passes: tuple[Pass, ...]
    options: tuple[str, ...] = ()

    @cached_property
    def flops(self) -> int:
        """Encoder FLOPs for one image of an epoch; a backward pass costs two forward passes."""
        return sum(one.views * forward_flops(one.tokens) * (3 if one.backward else 1) for one in self.passes)

    def epochs(self, budget: str) -> int:
        """How many epochs the budget pays for.

        Raises:
            ValueError: there is no such budget.
        """
        if budget not in BUDGETS:
            raise ValueError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
        if budget == "epochs":
            return EPOCHS
        return max(1, round(EPOCHS * METHODS["supervised"].flops / self.flops))


_ALL = PATCHES + 1
_VISIBLE = int(PATCHES * (1 - MASK_RATIO["mae"])) + 1
_LOCAL = (LOCAL_SIZE // PATCH_SIZE) ** 2 + 1
METHODS = {
    method.name: method
    for method in (
        Method("supervised", "Supervised", "supervised", (Pass(_ALL),)),
        Method(
            "mae", "MAE", "MIM", (Pass(_VISIBLE),),
            ("--mask-ratio", str(MASK_RATIO["mae"]),
             "--decoder-dim", "64", "--decoder-depth", "2", "--decoder-heads", "4"),
        ),
        Method(
            "simmim", "SimMIM", "MIM", (Pass(_ALL),),
            ("--mask-ratio", str(MASK_RATIO["simmim"]), "--mask-unit", str(PATCH_SIZE)),
        ),
        Method(
            "mocov3", "MoCo v3", "joint-embedding", (Pass(_ALL, 2), Pass(_ALL, 2, backward=False)),
            ("--momentum", str(MOMENTUM), "--mlp-dim", str(HEAD_DIM), "--out-dim", "128"),
        ),
        Method(
            "dino", "DINO", "joint-embedding",
            (Pass(_ALL, 2), Pass(_LOCAL, LOCAL_CROPS), Pass(_ALL, 2, backward=False)),
            ("--local-crops", str(LOCAL_CROPS), "--local-size", str(LOCAL_SIZE), "--prototypes", "2048",
             "--momentum", str(MOMENTUM), "--mlp-dim", str(HEAD_DIM)),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One model: a method, a budget and a seed."""

    method: str
    budget: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.budget}-{self.seed}"

    @property
    def epochs(self) -> int:
        return METHODS[self.method].epochs(self.budget)

    @property
    def run(self) -> Cell:
        """The cell whose run this one shares: that of equal epochs, where both budgets pay for as many."""
        shared = Cell(self.method, "epochs", self.seed)
        return shared if shared.epochs == self.epochs else self


def cells() -> Iterator[Cell]:
    """All cells that are run, one seed after the other, so that a study that was stopped early has whole seeds."""
    for seed in SEEDS:
        for budget in BUDGETS:
            for method in METHODS:
                cell = Cell(method, budget, seed)
                if cell.run == cell:
                    yield cell
