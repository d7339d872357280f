"""How many binaries a training needs while batches and shares of masked patches change: `python -m` prints JSON.

In a process without Triton's interpreter, which has kernels that are not specialised. Nothing is compiled: a digest
tells what would be.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from unittest import mock

from mimkernels.ops import _triton
from tests.compiled.ops_aot import specialised
from tests.compiled.triton_resources import digest
from tests.launches import BF16, BOOL, FP32, I64, U8, meta

# (Images, visible patches of 196): whole batches, short last ones, ratios from 0.7 to 0.75. All take the same tiles.
SIZES = ((256, 49), (255, 49), (160, 49), (129, 56), (256, 57))
# Of a mean that one program takes, and of poolings with one chunk of tokens an image or two.
FEW, MANY = ((32, 49), (31, 49)), ((1024, 49), (1000, 49))
TOKENS, DIM = 196, 768


def launches(images: int, kept: int) -> Iterator[tuple]:
    """(Op, function, arguments) of a step, with rows of 16 bits."""
    masked, x = TOKENS - kept, meta(images, TOKENS, DIM)
    visible, whole = meta(images, kept + 1, DIM), meta(images, TOKENS + 1, DIM)
    keep, back, mask = (
        meta(1, images, kept, dtype=I64),
        meta(images, TOKENS, dtype=I64),
        meta(images, TOKENS, dtype=BOOL),
    )
    row, rows, scale = meta(DIM), meta(TOKENS, DIM), meta(3, dtype=FP32)
    pixels = meta(images, 3, 1, 224, 224, dtype=U8)
    yield "gather_tokens", "gather_tokens_fwd", (x, keep, rows, meta(1, DIM))
    yield "gather_tokens", "gather_tokens_bwd", (visible, keep, TOKENS, 1, True, True, True)
    yield "restore_tokens", "restore_tokens_fwd", (visible, back, row, meta(TOKENS + 1, DIM), 1)
    yield "restore_tokens", "restore_tokens_bwd", (whole, back, kept, 1, True, True, True)
    yield "fill_mask_tokens", "fill_mask_tokens_fwd", (x, mask, row)
    yield "fill_mask_tokens", "fill_mask_tokens_bwd", (x, mask, True, True)
    yield "patchify_gather", "patchify_gather_fwd", (pixels, keep, 1, 16, 16, scale, scale, BF16)
    patches = meta(images, kept, DIM)
    yield "patchify_gather", "patchify_gather_bwd", (patches, keep, images, 3, 1, 224, 224, 1, 16, 16, scale, BF16)
    target = (pixels, meta(images, masked, dtype=I64), None, 1, 16, 16, scale, scale, True, 0, 1.0, True, True, 0)
    loss = (meta(images, masked, DIM), *target)
    yield "masked_patch_loss", "masked_patch_loss_fwd", loss
    yield "masked_patch_loss", "masked_patch_loss_bwd", (meta(dtype=FP32), *loss)
    features = (meta(images, masked, DIM), x, meta(images, masked, dtype=I64), True, 1e-5, 2, 2.0, True)
    yield "masked_feature_loss", "masked_feature_loss_fwd", features
    yield "masked_feature_loss", "masked_feature_loss_bwd", (meta(dtype=FP32), *features)
    wide, bias = meta(images, kept + 1, 4 * DIM), meta(4 * DIM)
    yield "bias_gelu", "bias_gelu_fwd", (wide, bias, False)
    yield "bias_gelu", "bias_gelu_bwd", (wide, wide, bias, False, True, True)
    weight, mean = meta(DIM, dtype=FP32), meta(images, kept + 1, dtype=FP32)
    stream = (visible, weight, None, None, mean, mean, BF16, True, True, True, True, False)
    yield "add_layer_norm", "add_layer_norm_fwd", (visible, visible, weight, weight, None, None, 1e-6, BF16)
    yield "add_layer_norm", "add_layer_norm_bwd", (visible, visible, visible, visible, *stream[1:])
    yield "query_pool", "query_pool_fwd", (x, meta(1, DIM), None, None, 0.125, 0, False)
    scores = meta(images, 1, TOKENS, dtype=FP32)
    yield "weighted_pool", "weighted_pool_fwd", (x, scores, None, True, 1)
    yield "weighted_pool", "weighted_pool_bwd", (meta(images, 1, DIM), None, x, scores, None, True, 1, True, True)
    yield "reduce_pool", "reduce_pool_fwd", (x, None, 2, 1, meta(1, dtype=FP32), 1e-6)


def binaries() -> dict[str, int]:
    """By pass and launch, how many there would be."""
    of_steps = _binaries(SIZES, lambda op: True)
    of_few = _binaries(FEW, lambda op: op == "masked_patch_loss")
    of_many = _binaries(MANY, lambda op: op == "query_pool")
    few = {f"{name}, few images": number for name, number in of_few.items()}
    return of_steps | few | {f"{name}, many images": number for name, number in of_many.items()}


def _binaries(sizes: tuple[tuple[int, int], ...], taken: Callable[[str], bool]) -> dict[str, int]:
    found: dict[str, set[str]] = {}
    for images, kept in sizes:
        for op, function, arguments in launches(images, kept):
            if not taken(op):
                continue
            launched: list[tuple] = []
            note = lambda kernel, programs, on, *args, **options: launched.append((kernel, args, options))  # noqa: E731, B023
            with mock.patch.object(_triton, "launch", note):
                getattr(import_module(f"mimkernels.ops.{op}.triton"), function)(*arguments)
            for place, launch in enumerate(launched):
                source, options = specialised(*launch)
                name = f"{function}, launch {place}: {source.name}"
                found.setdefault(name, set()).add(digest(source, 90, options))
    return {name: len(digests) for name, digests in found.items()}


if __name__ == "__main__":
    print(json.dumps(binaries()))
