"""Contract cases of attention, and inputs that its companions share."""

from __future__ import annotations

import torch

import mimkernels
from mimkernels.testing import Case, doubled

RICH = "mae"
SPOILED = "q"
PER_IMAGE = ("q", "k", "v", "key_mask")
MATRIX_PRODUCTS = True
STATISTICS = ("entropy", "prefix_mass", "self_mass", "distance", "patch_entropy", "peak", "patch_mass")


def attention(batch, heads, length, dim, *, keys=None, bias=None, mask=False, prefix=0, stats=(), **options):
    """``positions``: "shared" or "per-image"; ``logits``: the size of the scores; ``hidden``: -inf in the bias."""

    def make(generator):
        nk = length if keys is None else keys
        # Views of one packed projection, as in every ViT.
        packed = torch.randn(batch, max(length, nk), 3, heads, dim, generator=generator)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        inputs = {"q": q[:, :, :length] * options.get("logits", 1.0), "k": k[:, :, :nk], "v": v[:, :, :nk]}
        inputs["bias"] = None if bias is None else torch.randn(bias, generator=generator)
        if options.get("hidden"):
            inputs["bias"].masked_fill_(torch.rand(bias, generator=generator) < 0.3, float("-inf"))
        inputs["key_mask"] = torch.rand(batch, nk, generator=generator) < 0.7 if mask else None
        if mask and batch > 1:
            inputs["key_mask"][-1] = False  # an image that may attend nothing
        images = {"shared": (), "per-image": (batch,)}.get(options.get("positions", "shared"))
        coordinates = torch.rand(*images, max(0, length - prefix), 2, generator=generator) * 14
        inputs["positions"] = coordinates if "distance" in stats else None
        return {**inputs, "num_prefix": prefix, "stats": stats}

    return make


def companion(batch, heads, length, dim, **options):
    def make(generator):
        inputs = attention(batch, heads, length, dim, **options)(generator)
        kept = {name: inputs[name] for name in ("q", "k", "bias", "key_mask")}
        exact = {name: value for name, value in inputs.items() if name not in ("stats", "num_prefix", "positions")}
        kept["lse"] = mimkernels.attention(**doubled(exact), backend="reference").lse
        return kept

    return make


def companion_cases(op: str) -> list[Case]:
    """Cases of an op that takes the lse of attention."""
    inputs = {
        "plain": companion(2, 3, 50, 32),
        "masked": companion(2, 2, 21, 16, mask=True, bias=(2, 21, 21)),
        "bias-few-tokens": companion(2, 2, 9, 40, bias=(2, 9, 9)),
        "long": companion(1, 2, 300, 16),
        "cross": companion(2, 2, 9, 24, keys=30),
        "no-images": companion(0, 2, 5, 16),
        "no-queries": companion(1, 2, 0, 16, keys=8, bias=(2, 0, 8)),
        "empty-bias-and-mask": companion(2, 2, 5, 16, keys=0, bias=(2, 5, 0), mask=True),
    }
    return [Case(op, label, make) for label, make in inputs.items()]


INPUTS = {
    "plain": attention(2, 2, 17, 16),
    "mae": attention(2, 3, 50, 32, prefix=1, stats=STATISTICS),
    "everything": attention(
        3, 2, 21, 24, bias=(3, 2, 21, 21), mask=True, prefix=2, stats=STATISTICS, positions="per-image"
    ),
    "cross": attention(2, 2, 9, 16, keys=23, prefix=1, stats=("entropy", "prefix_mass", "patch_entropy", "peak")),
    "bias-per-head": attention(2, 3, 18, 16, bias=(3, 18, 18)),
    "bias-per-image": attention(2, 3, 18, 16, bias=(2, 1, 18, 18), stats=("entropy",)),
    "bias-shared": attention(2, 3, 18, 16, bias=(1, 1, 18, 18)),
    "bias-few-tokens": attention(2, 2, 9, 40, bias=(2, 9, 9), prefix=1, stats=STATISTICS, positions="shared"),
    "bias-few-queries": attention(2, 2, 3, 40, keys=21, bias=(2, 1, 3, 21)),
    "bias-hides": attention(2, 2, 20, 16, bias=(2, 20, 20), hidden=True, prefix=1, stats=STATISTICS),
    "key-mask": attention(3, 2, 19, 16, mask=True, prefix=1, stats=STATISTICS),
    "huge-logits": attention(1, 2, 33, 16, logits=300.0, prefix=1, stats=("entropy", "prefix_mass", "peak")),
    "no-images": attention(0, 2, 5, 16, stats=("entropy",)),
    "no-keys": attention(2, 2, 5, 16, keys=0, stats=("entropy",)),
    "no-queries": attention(2, 2, 0, 16, keys=5, stats=("entropy",)),
    "all-prefix": attention(1, 1, 3, 8, prefix=3, stats=("entropy", "prefix_mass", "patch_entropy", "patch_mass")),
    "empty-positions": attention(2, 2, 5, 8, prefix=5, stats=STATISTICS),
    "empty-positions-per-image": attention(2, 1, 3, 8, prefix=3, stats=("distance",), positions="per-image"),
    "empty-positions-long": attention(1, 1, 600, 8, prefix=600, stats=("distance",)),
    "empty-bias-and-mask": attention(2, 2, 5, 16, keys=0, bias=(2, 5, 0), mask=True, stats=("entropy",)),
    "bias-of-no-queries": attention(1, 2, 0, 16, keys=8, bias=(1, 0, 8), mask=True, stats=("entropy",)),
}
for stat in STATISTICS:
    INPUTS[f"only-{stat}"] = attention(1, 2, 26, 16, prefix=1, stats=(stat,))
for length in (1, 2, 49, 64, 197, 256, 257, 1025):
    INPUTS[f"length-{length}"] = attention(1, 1 if length > 64 else 2, length, 16, stats=("entropy", "self_mass"))
for dim in (8, 64, 72, 80, 88, 96, 128):
    INPUTS[f"dim-{dim}"] = attention(1, 1, 17, dim, stats=("entropy", "peak"))
CASES = [Case("attention", label, make, ("q", "k", "v", "bias")) for label, make in INPUTS.items()]
