"""The contract: every op's cases, which tests/test_contract.py runs on every backend.

Plain, odd sizes, empty, every option, and optional tensors that are given but empty.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import mimkernels
from mimkernels.testing import Case, doubled

# Of each op the case with the most options, for tests that one case is enough for, and the input that they spoil.
RICH = {
    "attention": ("mae", "q"),
    "attention_qkvpacked": ("plain", "qkv"),
    "received_attention": ("plain", "q"),
    "head_divergence": ("plain", "q"),
    "gather_tokens": ("mae", "x"),
    "restore_tokens": ("mae", "x"),
    "fill_mask_tokens": ("plain", "x"),
    "bias_gelu": ("plain", "x"),
    "patchify_gather": ("mae", "images"),
    "masked_patch_loss": ("mae", "pred"),
    "query_pool": ("mae", "queries"),
    "weighted_pool": ("plain", "x"),
    "reduce_pool": ("plain", "x"),
    "random_mask": ("mae", None),
    "mask_from_noise": ("mae", None),  # NaN counts as the largest number
}
WITHOUT_KERNELS = ("attention_rows",)  # plain torch on every device


def cases(op: str | None = None) -> list[Case]:
    """Every case, or those of one op."""
    return [case for case in _CASES if op is None or case.op == op]


def rich(op: str) -> Case:
    """The case of RICH."""
    (case,) = (case for case in cases(op) if case.label == RICH[op][0])
    return case


# ---- inputs ----


def attention(batch, heads, length, dim, *, keys=None, bias=None, mask=False, prefix=0, stats=(), **options):
    """``positions``: "shared" or "per-image"; ``logits``: the size of the scores; ``hidden``: -inf in the bias."""

    def make(generator):
        nk = length if keys is None else keys
        # Views of one packed projection, as in every ViT.
        packed = torch.randn(batch, max(length, nk), 3, heads, dim, generator=generator)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        made = {"q": q[:, :, :length] * options.get("logits", 1.0), "k": k[:, :, :nk], "v": v[:, :, :nk]}
        made["bias"] = None if bias is None else torch.randn(bias, generator=generator)
        if options.get("hidden"):
            made["bias"].masked_fill_(torch.rand(bias, generator=generator) < 0.3, float("-inf"))
        made["key_mask"] = torch.rand(batch, nk, generator=generator) < 0.7 if mask else None
        if mask and batch > 1:
            made["key_mask"][-1] = False  # an image that may attend nothing
        images = {"shared": (), "per-image": (batch,)}.get(options.get("positions", "shared"))
        coordinates = torch.rand(*images, max(0, length - prefix), 2, generator=generator) * 14
        made["positions"] = coordinates if "distance" in stats else None
        return {**made, "num_prefix": prefix, "stats": stats}

    return make


def companion(batch, heads, length, dim, **options):
    def make(generator):
        made = attention(batch, heads, length, dim, **options)(generator)
        kept = {name: made[name] for name in ("q", "k", "bias", "key_mask")}
        exact = {name: value for name, value in made.items() if name not in ("stats", "num_prefix", "positions")}
        kept["lse"] = mimkernels.attention(**doubled(exact), backend="reference").lse
        return kept

    return make


def packed_attention(*sizes, **options):
    def make(generator):
        made = attention(*sizes, **options)(generator)
        return {"qkv": torch.stack([made.pop(name).transpose(1, 2) for name in "qkv"], dim=2), **made}

    return make


def token_ids(generator: torch.Generator, *shape: int, tokens: int) -> Tensor:
    """Ids without repetition in the last dim."""
    *outer, keep = shape
    return torch.rand(*outer, tokens, generator=generator).argsort(-1)[..., :keep]


def gather(batch, tokens, keep, dim, *, masks=0, pos=False, prefix=None, repeat=False):
    def make(generator):
        outer = (masks, batch) if masks else (batch,)
        ids = token_ids(generator, *outer, keep, tokens=tokens)
        if repeat:
            ids = torch.randint(tokens, (*outer, keep), generator=generator)
        return {
            "x": torch.randn(batch, tokens, dim, generator=generator),
            "ids": ids,
            "pos": torch.randn(tokens, dim, generator=generator) if pos else None,
            "prefix": None if prefix is None else torch.randn(prefix, dim, generator=generator),
        }

    return make


def restore(batch, tokens, keep, dim, *, pos=False, num_prefix=0, repeat=False):
    def make(generator):
        restore = token_ids(generator, batch, tokens, tokens=tokens)
        if repeat:
            restore = torch.randint(tokens, (batch, tokens), generator=generator)
        return {
            "x": torch.randn(batch, num_prefix + keep, dim, generator=generator),
            "ids_restore": restore,
            "mask_token": torch.randn(dim, generator=generator),
            "pos": torch.randn(num_prefix + tokens, dim, generator=generator) if pos else None,
            "num_prefix": num_prefix,
        }

    return make


def fill(batch, tokens, dim, ratio=0.6):
    def make(generator):
        return {
            "x": torch.randn(batch, tokens, dim, generator=generator),
            "mask": torch.rand(batch, tokens, generator=generator) < ratio,
            "mask_token": torch.randn(dim, generator=generator),
        }

    return make


def bias_gelu(*size, bias=True, spread=1.0, **options):
    def make(generator):
        x = torch.randn(size, generator=generator) * spread
        return {"x": x, "bias": torch.randn(size[-1], generator=generator) if bias else None, **options}

    return make


def _images(generator, size, uint8):
    if uint8:
        return torch.randint(256, size, generator=generator, dtype=torch.uint8)
    return torch.rand(size, generator=generator)


def _normalisation(channels, given):
    return ([0.485, 0.456, 0.406][:channels], [0.229, 0.224, 0.225][:channels]) if given else (None, None)


def patchify(size, patch, keep, *, masks=0, uint8=False, normalise=False, repeat=False, dtype=None):
    def make(generator):
        tokens = _token_count(size, patch)
        outer = (masks, size[0]) if masks else (size[0],)
        ids = None if keep is None else token_ids(generator, *outer, keep, tokens=tokens)
        if repeat:
            ids = torch.randint(tokens, (*outer, keep), generator=generator)
        mean, std = _normalisation(size[1], normalise)
        arguments = {"images": _images(generator, size, uint8), "ids": ids, "patch_size": patch}
        return {**arguments, "mean": mean, "std": std, "dtype": dtype}

    return make


def loss(size, patch, keep, *, uint8=False, normalise=False, **options):
    def make(generator):
        tokens = _token_count(size, patch)
        sizes = (patch,) * (len(size) - 2) if isinstance(patch, int) else patch
        pixels = size[1] * math.prod(sizes)
        mean, std = _normalisation(size[1], normalise)
        arguments = {"images": _images(generator, size, uint8), "patch_size": patch, "mean": mean, "std": std}
        arguments["pred"] = torch.randn(size[0], tokens if keep is None else keep, pixels, generator=generator)
        if keep is None:
            arguments["mask"] = torch.rand(size[0], tokens, generator=generator) < 0.75
        else:
            arguments["ids"] = token_ids(generator, size[0], keep, tokens=tokens)
        return {**arguments, **options}

    return make


def _token_count(size, patch) -> int:
    sizes = (patch,) * (len(size) - 2) if isinstance(patch, int) else patch
    return math.prod(length // side for length, side in zip(size[2:], sizes, strict=True))


def _allowed(generator, batch, tokens, prefix):
    """A mask with one image that has no allowed token, and one that has a single one."""
    mask = torch.rand(batch, tokens, generator=generator) < 0.7
    mask[-1] = False
    mask[-2, prefix:] = False
    mask[-2, prefix : prefix + 1] = True
    mask[0, prefix : prefix + 1] = True
    return mask


def query_pool(batch, tokens, dim, groups, *, width=None, prefix=0, mask=False, per_image=False, **options):
    def make(generator):
        made = {
            "x": torch.randn(batch, tokens, dim, generator=generator),
            "queries": torch.randn(*(batch,) * per_image, groups, dim, generator=generator),
            "values": None if width is None else torch.randn(batch, tokens, width, generator=generator),
            "mask": _allowed(generator, batch, tokens, prefix) if mask else None,
        }
        return {**made, "num_prefix": prefix, **options}

    return make


def weighted_pool(batch, tokens, dim, groups=None, *, prefix=0, mask=False, **options):
    def make(generator):
        made = {
            "x": torch.randn(batch, tokens, dim, generator=generator),
            "scores": torch.randn(batch, *(() if groups is None else (groups,)), tokens, generator=generator),
            "mask": _allowed(generator, batch, tokens, prefix) if mask else None,
        }
        return {**made, "num_prefix": prefix, **options}

    return make


def reduce_pool(batch, tokens, dim, kind, *, prefix=0, mask=False, p=None, **options):
    def make(generator):
        made = {
            "x": torch.randn(batch, tokens, dim, generator=generator),
            "mask": _allowed(generator, batch, tokens, prefix) if mask else None,
        }
        if p is not None:
            made["p"] = torch.tensor([p])
        return {**made, "kind": kind, "num_prefix": prefix, **options}

    return make


_ALL = ("entropy", "prefix_mass", "self_mass", "distance", "patch_entropy", "peak", "patch_mass")
_QKV = ("q", "k", "v", "bias")


def _attention_cases() -> list[Case]:
    made = {
        "plain": attention(2, 2, 17, 16),
        "mae": attention(2, 3, 50, 32, prefix=1, stats=_ALL),
        "everything": attention(
            3, 2, 21, 24, bias=(3, 2, 21, 21), mask=True, prefix=2, stats=_ALL, positions="per-image"
        ),
        "cross": attention(2, 2, 9, 16, keys=23, prefix=1, stats=("entropy", "prefix_mass", "patch_entropy", "peak")),
        "bias-per-head": attention(2, 3, 18, 16, bias=(3, 18, 18)),
        "bias-per-image": attention(2, 3, 18, 16, bias=(2, 1, 18, 18), stats=("entropy",)),
        "bias-shared": attention(2, 3, 18, 16, bias=(1, 1, 18, 18)),
        "bias-few-tokens": attention(2, 2, 9, 40, bias=(2, 9, 9), prefix=1, stats=_ALL, positions="shared"),
        "bias-few-queries": attention(2, 2, 3, 40, keys=21, bias=(2, 1, 3, 21)),
        "bias-hides": attention(2, 2, 20, 16, bias=(2, 20, 20), hidden=True, prefix=1, stats=_ALL),
        "key-mask": attention(3, 2, 19, 16, mask=True, prefix=1, stats=_ALL),
        "huge-logits": attention(1, 2, 33, 16, logits=300.0, prefix=1, stats=("entropy", "prefix_mass", "peak")),
        "no-images": attention(0, 2, 5, 16, stats=("entropy",)),
        "no-keys": attention(2, 2, 5, 16, keys=0, stats=("entropy",)),
        "no-queries": attention(2, 2, 0, 16, keys=5, stats=("entropy",)),
        "all-prefix": attention(1, 1, 3, 8, prefix=3, stats=("entropy", "prefix_mass", "patch_entropy", "patch_mass")),
        "empty-positions": attention(2, 2, 5, 8, prefix=5, stats=_ALL),
        "empty-positions-per-image": attention(2, 1, 3, 8, prefix=3, stats=("distance",), positions="per-image"),
        "empty-positions-long": attention(1, 1, 600, 8, prefix=600, stats=("distance",)),
        "empty-bias-and-mask": attention(2, 2, 5, 16, keys=0, bias=(2, 5, 0), mask=True, stats=("entropy",)),
        "bias-of-no-queries": attention(1, 2, 0, 16, keys=8, bias=(1, 0, 8), mask=True, stats=("entropy",)),
    }
    for stat in _ALL:
        made[f"only-{stat}"] = attention(1, 2, 26, 16, prefix=1, stats=(stat,))
    for length in (1, 2, 49, 64, 197, 256, 257, 1025):
        made[f"length-{length}"] = attention(1, 1 if length > 64 else 2, length, 16, stats=("entropy", "self_mass"))
    for dim in (8, 64, 72, 80, 88, 96, 128):
        made[f"dim-{dim}"] = attention(1, 1, 17, dim, stats=("entropy", "peak"))
    # Only where gradients are written differs from `attention`.
    packed = {
        "plain": packed_attention(2, 2, 17, 16),
        "everything": packed_attention(
            3, 2, 21, 24, bias=(3, 2, 21, 21), mask=True, prefix=2, stats=_ALL, positions="per-image"
        ),
        "one-token": packed_attention(2, 3, 1, 8, stats=("entropy", "peak")),
        "no-tokens": packed_attention(2, 2, 0, 16, stats=("entropy",)),
        "empty-positions": packed_attention(2, 2, 5, 8, prefix=5, stats=("distance", "entropy")),
        "empty-bias-and-mask": packed_attention(2, 2, 0, 16, bias=(2, 0, 0), mask=True, stats=("distance",)),
        "odd": packed_attention(3, 5, 9, 24, stats=("entropy",)),
        "length-257": packed_attention(1, 1, 257, 16),
        "dim-128": packed_attention(1, 2, 33, 128),
    }
    return [Case("attention", label, make, _QKV) for label, make in made.items()] + [
        Case("attention_qkvpacked", label, make, ("qkv", "bias")) for label, make in packed.items()
    ]


def _companion_cases(op: str) -> list[Case]:
    made = {
        "plain": companion(2, 3, 50, 32),
        "masked": companion(2, 2, 21, 16, mask=True, bias=(2, 21, 21)),
        "bias-few-tokens": companion(2, 2, 9, 40, bias=(2, 9, 9)),
        "long": companion(1, 2, 300, 16),
        "cross": companion(2, 2, 9, 24, keys=30),
        "no-images": companion(0, 2, 5, 16),
        "no-queries": companion(1, 2, 0, 16, keys=8, bias=(2, 0, 8)),
        "empty-bias-and-mask": companion(2, 2, 5, 16, keys=0, bias=(2, 5, 0), mask=True),
    }
    return [Case(op, label, make) for label, make in made.items()]


_GATHER = ("x", "pos", "prefix")
_RESTORE = ("x", "mask_token", "pos")
_FILL = ("x", "mask_token")
_CASES = [
    Case("gather_tokens", "plain", gather(2, 16, 4, 32), _GATHER),
    Case("gather_tokens", "mae", gather(3, 49, 12, 64, pos=True, prefix=1), _GATHER),
    Case("gather_tokens", "odd", gather(3, 17, 5, 37, pos=True, prefix=2), _GATHER),
    Case("gather_tokens", "masks", gather(2, 20, 6, 24, masks=3, pos=True, prefix=1), _GATHER),
    Case("gather_tokens", "repeated-ids", gather(2, 7, 11, 19, masks=2, pos=True), _GATHER),
    Case("gather_tokens", "keep-all", gather(2, 9, 9, 16), _GATHER),
    Case("gather_tokens", "one", gather(1, 1, 1, 1, pos=True, prefix=1), _GATHER),
    Case("gather_tokens", "no-images", gather(0, 8, 3, 16, pos=True, prefix=1), _GATHER),
    Case("gather_tokens", "no-ids", gather(2, 8, 0, 16, prefix=2), _GATHER),
    Case("gather_tokens", "empty-prefix", gather(2, 8, 3, 16, prefix=0), _GATHER),
    Case("gather_tokens", "empty-pos", gather(2, 0, 0, 16, pos=True, prefix=1), _GATHER),
    Case("gather_tokens", "nothing", gather(2, 0, 0, 16, pos=True, prefix=0), _GATHER),
    Case("gather_tokens", "no-columns", gather(2, 8, 3, 0, pos=True, prefix=1), _GATHER),
    Case("restore_tokens", "plain", restore(2, 16, 4, 32), _RESTORE),
    Case("restore_tokens", "mae", restore(3, 49, 12, 64, pos=True, num_prefix=1), _RESTORE),
    Case("restore_tokens", "odd", restore(3, 17, 5, 37, pos=True, num_prefix=2), _RESTORE),
    Case("restore_tokens", "keep-all", restore(2, 9, 9, 16, pos=True), _RESTORE),
    Case("restore_tokens", "keep-none", restore(2, 9, 0, 16, num_prefix=1), _RESTORE),
    Case("restore_tokens", "not-a-permutation", restore(2, 12, 5, 19, repeat=True, pos=True), _RESTORE),
    Case("restore_tokens", "empty-pos", restore(2, 0, 0, 16, pos=True), _RESTORE),
    Case("restore_tokens", "prefix-alone", restore(2, 0, 0, 16, pos=True, num_prefix=2), _RESTORE),
    Case("restore_tokens", "no-columns", restore(2, 9, 4, 0, pos=True, num_prefix=1), _RESTORE),
    Case("restore_tokens", "no-images", restore(0, 8, 3, 16, pos=True, num_prefix=1), _RESTORE),
    Case("fill_mask_tokens", "plain", fill(3, 49, 64), _FILL),
    Case("fill_mask_tokens", "odd", fill(2, 17, 37), _FILL),
    Case("fill_mask_tokens", "all-masked", fill(2, 5, 16, ratio=2.0), _FILL),
    Case("fill_mask_tokens", "none-masked", fill(2, 5, 16, ratio=-1.0), _FILL),
    Case("fill_mask_tokens", "empty-mask", fill(2, 0, 16), _FILL),
    Case("fill_mask_tokens", "no-images", fill(0, 5, 16), _FILL),
    Case("patchify_gather", "plain", patchify((2, 3, 32, 32), 8, 4), ("images",)),
    Case("patchify_gather", "mae", patchify((2, 3, 32, 32), 16, 1, normalise=True), ("images",)),
    Case("patchify_gather", "all", patchify((2, 3, 12, 20), 4, None, normalise=True), ("images",)),
    Case("patchify_gather", "odd", patchify((2, 2, 9, 25), (3, 5), 7), ("images",)),
    Case("patchify_gather", "masks", patchify((2, 3, 16, 16), 4, 5, masks=3, normalise=True), ("images",)),
    Case("patchify_gather", "repeated-ids", patchify((2, 1, 8, 8), 4, 6, repeat=True), ("images",)),
    Case("patchify_gather", "video", patchify((2, 3, 4, 8, 12), (2, 4, 4), 5, normalise=True), ("images",)),
    Case("patchify_gather", "uint8", patchify((2, 3, 16, 16), 4, 5, uint8=True, normalise=True)),
    Case(
        "patchify_gather",
        "uint8-bf16",
        patchify((2, 3, 8, 8), 4, 3, uint8=True, normalise=True, dtype=torch.bfloat16),
    ),
    Case("patchify_gather", "uint8-video", patchify((1, 3, 4, 8, 8), 4, 3, uint8=True, normalise=True)),
    Case("patchify_gather", "no-images", patchify((0, 3, 8, 8), 4, 2), ("images",)),
    Case("patchify_gather", "empty-ids", patchify((2, 3, 8, 8), 4, 0, normalise=True), ("images",)),
    Case("patchify_gather", "no-patches", patchify((2, 3, 0, 8), 4, 0), ("images",)),
    Case("patchify_gather", "no-channels", patchify((2, 0, 8, 8), 4, 3, normalise=True), ("images",)),
    Case("masked_patch_loss", "ids", loss((2, 3, 32, 32), 8, 12), ("pred",)),
    Case("masked_patch_loss", "mae", loss((2, 3, 32, 32), 16, 3, norm_pix=True, normalise=True), ("pred",)),
    Case("masked_patch_loss", "mask", loss((3, 3, 16, 24), 8, None, norm_pix=True), ("pred",)),
    Case("masked_patch_loss", "per-patch", loss((2, 3, 16, 16), 4, None, reduction="none"), ("pred",)),
    Case(
        "masked_patch_loss",
        "per-patch-ids",
        loss((2, 3, 16, 16), 4, 5, reduction="none", norm_pix=True),
        ("pred",),
    ),
    Case("masked_patch_loss", "l1", loss((2, 3, 16, 16), 4, 5, kind="l1", layout="channels_first"), ("pred",)),
    Case(
        "masked_patch_loss",
        "smooth-l1",
        loss((2, 3, 16, 16), 4, None, kind="smooth_l1", beta=0.5),
        ("pred",),
    ),
    Case("masked_patch_loss", "odd", loss((2, 2, 9, 25), (3, 5), 7, norm_pix=True), ("pred",)),
    Case(
        "masked_patch_loss",
        "channels-first",
        loss((2, 3, 12, 8), 4, None, layout="channels_first", norm_pix=True),
        ("pred",),
    ),
    Case(
        "masked_patch_loss",
        "uint8",
        loss((2, 3, 16, 16), 8, 3, uint8=True, normalise=True, norm_pix=True),
        ("pred",),
    ),
    Case("masked_patch_loss", "video", loss((2, 3, 4, 8, 8), (2, 4, 4), 5, norm_pix=True), ("pred",)),
    Case("masked_patch_loss", "no-images", loss((0, 3, 8, 8), 4, 2), ("pred",)),
    Case("masked_patch_loss", "empty-ids", loss((2, 3, 8, 8), 4, 0), ("pred",)),
    Case("masked_patch_loss", "empty-ids-per-patch", loss((2, 3, 8, 8), 4, 0, reduction="none"), ("pred",)),
    Case("masked_patch_loss", "empty-mask", loss((2, 3, 0, 8), 4, None, norm_pix=True), ("pred",)),
    Case("masked_patch_loss", "no-channels", loss((2, 0, 8, 8), 4, 3, normalise=True), ("pred",)),
]
_CASES += _attention_cases() + _companion_cases("received_attention") + _companion_cases("head_divergence")
_QUERY_POOL = ("queries", "x", "values")
_WEIGHTED_POOL = ("x", "scores")
_REDUCE_POOL = ("x", "p")


def _pool_cases() -> list[Case]:
    """The first of each op's gradients is of an input whose first element always counts."""
    query = {
        "mae": query_pool(3, 50, 48, 2, prefix=1, mask=True, return_weights=True),
        "plain": query_pool(2, 49, 64, 1),
        "abmilp": query_pool(2, 197, 96, 1, prefix=1, scale=1.0),
        "efficient-probing": query_pool(2, 49, 64, 8, width=64, sliced=True, prefix=1),
        "sliced": query_pool(3, 21, 36, 3, sliced=True, mask=True, return_weights=True),
        "values": query_pool(2, 33, 24, 5, width=40, per_image=True, return_weights=True),
        "odd": query_pool(3, 17, 37, 7, width=35, prefix=2, mask=True, sliced=True, return_weights=True),
        "odd-per-image": query_pool(2, 19, 37, 11, per_image=True, mask=True),
        "many-queries": query_pool(2, 30, 32, 33, return_weights=True),
        "long": query_pool(1, 1025, 16, 2),
        "wide": query_pool(1, 9, 1100, 1, prefix=1, return_weights=True),
        "huge-logits": query_pool(1, 40, 16, 2, scale=300.0, return_weights=True),
        "one": query_pool(1, 1, 1, 1, return_weights=True),
        "all-prefix": query_pool(2, 3, 8, 2, prefix=3, return_weights=True),
        "no-queries": query_pool(2, 5, 8, 0, return_weights=True),
        "no-tokens": query_pool(2, 0, 8, 2, return_weights=True),
        "no-columns": query_pool(2, 5, 0, 2, width=8, scale=1.0, return_weights=True),
        "no-images": query_pool(0, 5, 16, 2, width=8, return_weights=True),
        "empty-mask": query_pool(2, 0, 8, 2, mask=True, return_weights=True),
        "empty-values": query_pool(2, 5, 8, 2, width=0, mask=True, return_weights=True),
        "no-tokens-of-values": query_pool(2, 0, 8, 2, width=4, return_weights=True),
    }
    weighted = {
        "plain": weighted_pool(2, 49, 64, return_weights=True),
        "groups": weighted_pool(3, 50, 48, 6, prefix=1, mask=True, return_weights=True),
        "as-given": weighted_pool(3, 21, 40, 3, normalize=False, mask=True, return_weights=True),
        "odd": weighted_pool(3, 17, 37, prefix=2, mask=True),
        "long": weighted_pool(1, 1025, 16, 2),
        "wide": weighted_pool(1, 9, 1100, 1, normalize=False, prefix=1),
        "all-prefix": weighted_pool(2, 3, 8, prefix=3, return_weights=True),
        "no-tokens": weighted_pool(2, 0, 8, return_weights=True),
        "no-images": weighted_pool(0, 5, 16, 2),
        "empty-mask": weighted_pool(2, 0, 8, 3, mask=True, return_weights=True),
        "empty-mask-as-given": weighted_pool(2, 0, 8, normalize=False, mask=True),
        "no-columns": weighted_pool(2, 5, 0, 2, return_weights=True),
    }
    reduce = {
        "mean": reduce_pool(2, 49, 64, "mean"),
        "mean-masked": reduce_pool(3, 50, 37, "mean", prefix=1, mask=True),
        "mean-long": reduce_pool(1, 1025, 24, "mean"),
        "max": reduce_pool(2, 49, 64, "max"),
        "max-masked": reduce_pool(3, 50, 37, "max", prefix=1, mask=True),
        "plain": reduce_pool(2, 49, 64, "gem", p=3.0),
        "gem-masked": reduce_pool(3, 50, 37, "gem", p=2.5, prefix=1, mask=True),
        "gem-number": reduce_pool(2, 197, 40, "gem", prefix=1),
        "gem-floor": reduce_pool(2, 9, 16, "gem", p=4.0, eps=0.5),
        "one": reduce_pool(1, 1, 1, "gem", p=2.5),
        "all-prefix": reduce_pool(2, 3, 8, "max", prefix=3),
        "no-tokens": reduce_pool(2, 0, 8, "gem", p=3.0),
        "no-images": reduce_pool(0, 5, 16, "mean"),
        "gem-no-images": reduce_pool(0, 5, 16, "gem", p=3.0),
        "empty-mask-mean": reduce_pool(2, 0, 8, "mean", mask=True),
        "empty-mask-max": reduce_pool(2, 0, 8, "max", mask=True),
        "empty-mask-gem": reduce_pool(2, 0, 8, "gem", p=3.0, mask=True),
        "no-columns": reduce_pool(2, 5, 0, "gem", p=3.0),
    }
    made = {"query_pool": (query, _QUERY_POOL), "weighted_pool": (weighted, _WEIGHTED_POOL)}
    made["reduce_pool"] = (reduce, _REDUCE_POOL)
    return [Case(op, label, make, grads) for op, (some, grads) in made.items() for label, make in some.items()]


_CASES += _pool_cases()


def _bias_gelu_cases() -> list[Case]:
    made = {
        "plain": bias_gelu(2, 49, 64),
        "odd": bias_gelu(3, 17, 37),
        "no-bias": bias_gelu(2, 21, 40, bias=False),
        "tanh": bias_gelu(2, 33, 48, approximate="tanh"),
        "large": bias_gelu(2, 40, 56, spread=5.0),
        "tanh-large": bias_gelu(2, 40, 56, spread=5.0, approximate="tanh"),
        "four-dims": bias_gelu(2, 3, 5, 24),
        "vector": bias_gelu(70),
        "many-rows": bias_gelu(5000, 8),
        "wide": bias_gelu(5, 3072),
        "one": bias_gelu(1, 1, 1),
        "no-rows": bias_gelu(2, 0, 16),
        "no-images": bias_gelu(0, 5, 16),
        "no-columns": bias_gelu(2, 5, 0),
    }
    grads = ("x", "bias")
    with_parameter = {"fp32-bias": bias_gelu(3, 21, 40), "tanh-fp32-bias": bias_gelu(2, 9, 35, approximate="tanh")}
    return [Case("bias_gelu", label, make, grads) for label, make in made.items()] + [
        Case("bias_gelu", label, make, grads, (torch.bfloat16, torch.float16), ("bias",))
        for label, make in with_parameter.items()
    ]


_CASES += _bias_gelu_cases()


def random_mask(batch, tokens, keep, **options):
    return lambda generator: {"batch": batch, "tokens": tokens, "keep": keep, "device": None, **options}


def mask_from_noise(batch, tokens, keep, *, ties=False, **options):
    def make(generator):
        noise = torch.rand(batch, tokens, generator=generator)
        return {"noise": (noise * 4).round() if ties else noise, "keep": keep, **options}

    return make


def _mask_cases() -> list[Case]:
    drawn = {
        "mae": random_mask(3, 196, 49, seed=7, offset=3),
        "sorted": random_mask(2, 50, 12, seed=2**62 + 12345, offset=2**40 + 7, order="sorted"),
        "step": random_mask(2, 17, 5, seed=0, offset=torch.tensor(5)),
        "keep-all": random_mask(4, 50, 50, seed=9),
        "one": random_mask(1, 1, 1, seed=1),
        "no-images": random_mask(0, 8, 2, seed=1),
    }
    given = {
        "mae": mask_from_noise(3, 196, 49),
        "sorted": mask_from_noise(2, 257, 64, order="sorted"),
        "ties": mask_from_noise(2, 33, 8, ties=True),
        "keep-all": mask_from_noise(2, 17, 17),
        "one": mask_from_noise(1, 1, 1),
        "no-images": mask_from_noise(0, 8, 2),
    }
    made = {"random_mask": drawn, "mask_from_noise": given}
    return [Case(op, label, make, dtypes=(torch.float32,)) for op, some in made.items() for label, make in some.items()]


_CASES += _mask_cases()
