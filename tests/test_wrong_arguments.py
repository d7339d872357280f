"""Arguments of a kind that nothing here takes: of heads, masks, models and modules, refused in words that name them."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import mimkernels
from mimkernels import heads
from mimkernels.data.masks import MaskSampler
from mimkernels.integrations.xformers import fmha, memory_efficient_attention
from mimkernels.nn import build_pooling, embed_visible, sincos_positions_2d

timm = pytest.importorskip("timm")

from mimkernels.models import DINO, MAE, MoCoV3, SimMIM, Supervised, captured_step  # noqa: E402
from mimkernels.nn import use_mimkernels_attention  # noqa: E402
from tests.integrations import models as m  # noqa: E402

ROWS, SQUARES, PACKED, IMAGES = torch.rand(2, 3, 17), torch.rand(1, 8, 8), torch.rand(1, 10, 2, 8), torch.rand(2, 2)
ENCODER = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def capture(**arguments):
    return mimkernels.capture(m.hand_written(), **{"stats": ["entropy"], "num_prefix": 1, **arguments})


def statistics(quantity="entropy"):
    return heads.HeadStatistics(quantities=[quantity])


def sample(strategy="random", **arguments):
    return MaskSampler((4, 4), strategy).sample(2, 0, **arguments)


def recordable():
    model = timm.create_model(**{"model_name" if key == "name" else key: value for key, value in ENCODER.items()})
    use_mimkernels_attention(model)
    return model


def xformers(query="query", value="value", **arguments):
    q = PACKED if query == "query" else query
    return memory_efficient_attention(q, PACKED, PACKED if isinstance(value, str) else value, **arguments)


def clipped_by(norm):
    model = nn.Linear(2, 2)
    return captured_step(model, torch.optim.AdamW(model.parameters()), IMAGES, clip_grad=norm, stand_in=True)


def backend(name):
    with mimkernels.use_backend(name):
        pass


CALLS = {
    # capture: 14 for (14, 14), 0 for [0], None for nothing
    "positions of one number": (
        lambda: capture(positions=14),
        ValueError,
        r"patches per axis such as \(14, 14\).*got 14",
    ),
    "positions without a rank": (lambda: capture(positions=torch.zeros(5)), ValueError, r"\[N, d\].*got \[5\]"),
    "positions of no sides": (lambda: capture(positions=()), ValueError, r"got \(\)"),
    "positions of a half patch": (lambda: capture(positions=(2.5, 4)), ValueError, r"got \(2.5, 4\)"),
    "layers of one number": (lambda: capture(layers=0), ValueError, "layers must be names, numbers from 0 .*got 0"),
    "no layers": (lambda: capture(layers=[]), ValueError, r"layers must be names, .*got \[\]"),
    "stats of a number": (lambda: capture(stats=3), TypeError, "names of statistics and presets, got int 3"),
    "one of stats a number": (lambda: capture(stats=["entropy", 3]), TypeError, "presets, got int 3"),
    "keep None": (lambda: capture(keep=None), ValueError, r"keep=\('q', 'k'\), got None"),
    "num_prefix True": (lambda: capture(num_prefix=True), ValueError, "num_prefix must be .*got True"),
    # statistics
    "presets None": (
        lambda: heads.HeadStatistics(None),
        TypeError,
        "presets must be a sequence of names, got NoneType",
    ),
    "a preset that is a list": (lambda: heads.HeadStatistics([[1]]), ValueError, r"unknown preset \[1\]"),
    "num_prefix of a half": (
        lambda: heads.HeadStatistics("park", num_prefix=2.5),
        TypeError,
        "num_prefix.*int, got float",
    ),
    "unit of a list": (lambda: heads.HeadStatistics("park", unit=[]), TypeError, r"unit must be a str .*got \[\]"),
    "grid of a number": (
        lambda: heads.HeadStatistics("park", grid=4),
        TypeError,
        r"grid must be \(rows, columns\).*got 4",
    ),
    "grid of three": (
        lambda: heads.HeadStatistics("park", grid=(1, 2, 3)),
        TypeError,
        r"grid must be .*got \(1, 2, 3\)",
    ),
    "layer of a half": (lambda: statistics().update(0.5, {}), TypeError, "layer must be an int, got float"),
    "stats of a tensor": (lambda: statistics().update(0, ROWS), TypeError, "what attention returned, .*got Tensor"),
    "q of numpy": (
        lambda: statistics("head_divergence").update(0, {}, q=np.ones(3), k=ROWS, lse=ROWS),
        TypeError,
        "q must be a torch.Tensor, got ndarray",
    ),
    "merge": (lambda: statistics().merge({}), TypeError, "merged with HeadStatistics, got dict"),
    "from_dict": (lambda: heads.HeadStatistics.from_dict([]), TypeError, "what to_dict gave, got list"),
    # functions of rows
    "rows of two dims": (
        lambda: heads.query_mean(ROWS[0]),
        ValueError,
        r"rows must have 3 dimensions, got 2 \(\[3, 17\]\)",
    ),
    "rows of booleans": (lambda: heads.query_mean(ROWS > 0), TypeError, "rows must be a floating-point tensor"),
    "negative num_prefix": (lambda: heads.query_mean(ROWS, -3), ValueError, "num_prefix must not be negative, got -3"),
    "entropy of two dims": (
        lambda: heads.normalized_entropy(ROWS[0]),
        ValueError,
        "entropy must have 3 dimensions, got 2",
    ),
    "bias of other tokens": (
        lambda: heads.normalized_entropy(ROWS, torch.zeros(1, 5, 5)),
        ValueError,
        r"bias \[1, 5, 5\] must be \[W, H or 1, N, N\].*\[2, 3, 17\]",
    ),
    "bias of no windows": (
        lambda: heads.normalized_entropy(ROWS, torch.zeros(0, 1, 17, 17)),
        ValueError,
        r"W a divisor of B.*\[2, 3, 17\]",
    ),
    "key_mask of other tokens": (
        lambda: heads.normalized_entropy(ROWS, key_mask=torch.ones(2, 5).bool()),
        ValueError,
        r"key_mask \[2, 5\] must be \[B, N\] for entropy \[2, 3, 17\]",
    ),
    "mass of other images": (
        lambda: heads.renormalized_distance(ROWS, ROWS[:1]),
        ValueError,
        r"distance \[2, 3, 17\] and patch_mass \[1, 3, 17\]",
    ),
    "similarity of an image": (
        lambda: heads.token_similarity(ROWS[0]),
        ValueError,
        "tokens must have 3 dimensions, got 2",
    ),
    "similarity, num_prefix": (
        lambda: heads.token_similarity(ROWS, -3),
        ValueError,
        "num_prefix is -3 but there are 3",
    ),
    "amplitudes, grid": (lambda: heads.relative_log_amplitude(ROWS, 4), ValueError, r"\(rows, columns\) .*got 4"),
    "weights of a regulariser": (
        lambda: heads.regularization_loss(["entropy"], {}),
        TypeError,
        "weights must be .*got list",
    ),
    "stats of a regulariser": (
        lambda: heads.regularization_loss({"entropy": 1.0}, 3),
        TypeError,
        "stats must be tensors by statistic, .*got int",
    ),
    "terms of a regulariser": (
        lambda: heads.parse_regularizers([1]),
        TypeError,
        "a regulariser must be a str.*got int",
    ),
    "grid None": (lambda: heads.patch_grid_positions(None), TypeError, "grid must be a number .*got NoneType"),
    "patch of text": (
        lambda: heads.patch_grid_positions(4, "pixel", "16"),
        TypeError,
        "patch_size must be .*got str '16'",
    ),
    "required_stats": (lambda: heads.required_stats(3), TypeError, "a preset or quantity is a str .*got int 3"),
    "Gram matrices": (lambda: heads.unbiased_hsic(None, SQUARES), TypeError, "k must be a torch.Tensor, got NoneType"),
    "features of a number": (lambda: heads.CKA().update(3), ValueError, r"must be a sequence of \[B, D\]"),
    "features of numbers": (lambda: heads.CKA().update([1.0]), TypeError, "must be a torch.Tensor, got float"),
    "a picture of captured heads": (
        lambda: heads.plot_heads({"blocks.0": heads.LayerHeads("blocks.0", 0)}, "entropy"),
        TypeError,
        "got LayerHeads by the name 'blocks.0'; of what capture gives these are its `statistics`",
    ),
    "heads to ablate": (
        lambda: heads.ablate(m.vit(), None),
        TypeError,
        r"by layer, such as \{0: \[1\]\}, got NoneType",
    ),
    "a head to ablate": (lambda: heads.ablate(m.vit(), {0: 1}), ValueError, "layer 0 must be numbers from 0, got 1"),
    "True to ablate": (lambda: heads.ablate(m.vit(), {0: [True]}), ValueError, r"must be numbers from 0, got \[True\]"),
    "importance": (lambda: heads.head_importance(m.vit(), ROWS), TypeError, "forward must run the model, got Tensor"),
    "record no model": (lambda: heads.record_heads(3), TypeError, "takes a module or several, got int"),
    "record a number": (lambda: heads.record_heads(recordable(), 3), TypeError, "stats must be a sequence .*got int"),
    "keep a number": (lambda: heads.record_heads(recordable(), keep=3), TypeError, "keep must be a sequence .*got int"),
    "record, positions": (
        lambda: heads.record_heads(recordable(), ["distance"], positions=3),
        ValueError,
        r"positions must be coordinates \[N, d\] .*got int",
    ),
    "record, positions of a row": (
        lambda: heads.record_heads(recordable(), positions=torch.zeros(3)),
        ValueError,
        r"coordinates \[N, d\] .*got \[3\]",
    ),
    # masks
    "strategy of a list": (
        lambda: MaskSampler((4, 4), ["random"]),
        ValueError,
        r"strategy must be one of .*got \['random'\]",
    ),
    "a backend of none": (lambda: MaskSampler((4, 4), backend="gpu"), ValueError, "must be one of auto, .*got 'gpu'"),
    "scores of a list": (lambda: sample(scores=[1]), ValueError, "random takes no scores, got list"),
    "img_size None": (lambda: MaskSampler.for_images(None, 16), ValueError, r"img_size must be .*got None"),
    "min_patches": (
        lambda: MaskSampler((4, 4), "block", count=4, min_patches=10**30),
        ValueError,
        f"below {2**31}, got 10+",
    ),
    # models
    "MAE, mask_ratio": (
        lambda: MAE.from_timm(**ENCODER, mask_ratio="0.5"),
        TypeError,
        "mask_ratio .*number, got str '0.5'",
    ),
    "MAE, depth": (
        lambda: MAE.from_timm(**ENCODER, decoder_depth=2.5),
        TypeError,
        "decoder_depth must be an integer, got float",
    ),
    "MAE, heads": (
        lambda: MAE.from_timm(**ENCODER, decoder_heads=None),
        TypeError,
        "decoder_heads .*got NoneType None",
    ),
    "SimMIM, mask_ratio": (
        lambda: SimMIM.from_timm(**ENCODER, mask_ratio=None),
        TypeError,
        "mask_ratio .*got NoneType",
    ),
    "SimMIM, loss": (
        lambda: SimMIM.from_timm(**ENCODER, loss=["l1"]),
        ValueError,
        r"loss must be one of .*got \['l1'\]",
    ),
    "SimMIM, size": (
        lambda: SimMIM.from_timm(**{**ENCODER, "img_size": 2.5}),
        ValueError,
        "img_size must be .*got 2.5",
    ),
    "MoCo v3": (
        lambda: MoCoV3.from_timm(**ENCODER, temperature="1"),
        TypeError,
        "temperature must be a number, got str",
    ),
    "DINO": (
        lambda: DINO.from_timm(**ENCODER, student_temp=None),
        TypeError,
        "student_temp must be a number, got None",
    ),
    "supervised": (
        lambda: Supervised.from_timm(**ENCODER, num_classes="5"),
        TypeError,
        "num_classes must be an integer",
    ),
    # modules and drop-ins
    "a pooling without a name": (
        lambda: build_pooling(None, 8, 1),
        TypeError,
        "named by a str, got NoneType; known: cls",
    ),
    "dim of a half": (lambda: build_pooling("mean", 2.5, 1), TypeError, "mean: dim must be an int, got float"),
    "num_prefix of a half, pooling": (lambda: build_pooling("mean", 8, 0.5), TypeError, "num_prefix must be an int"),
    "tokens of a list": (
        lambda: build_pooling("mean", 8, 1)([1]),
        TypeError,
        "mean: tokens must be a torch.Tensor, got list",
    ),
    "sine and cosine, grid": (lambda: sincos_positions_2d(8, 4), ValueError, r"grid must be \(rows, columns\).*got 4"),
    "sine and cosine, prefix": (
        lambda: sincos_positions_2d(8, (4, 4), -3),
        ValueError,
        "num_prefix must not be negative",
    ),
    "embedding": (lambda: embed_visible(ROWS, None, nn.Linear(2, 2)), TypeError, "proj must be .*Conv2d, got Linear"),
    "embedded rows": (
        lambda: embed_visible(ROWS, None, nn.Conv2d(3, 2, 2, 2)),
        ValueError,
        "images must have 4 dimensions",
    ),
    "xformers, no query": (lambda: xformers(None), TypeError, "query must be a torch.Tensor, got NoneType"),
    "xformers, ranks": (lambda: xformers(value=PACKED[0]), ValueError, r"dimensions differ: .*value \[10, 2, 8\]"),
    "xformers, lengths": (
        lambda: xformers(value=PACKED[:, :3]),
        ValueError,
        r"as many as values.*value \[1, 3, 2, 8\]",
    ),
    "xformers, dtypes": (lambda: xformers(value=PACKED.double()), ValueError, "dtypes differ: .*value torch.float64"),
    "xformers, dropout": (lambda: xformers(p=2.0), ValueError, "p must be a probability, from 0 to 1, got 2.0"),
    "half a token": (lambda: fmha.BlockDiagonalMask([2.5]), TypeError, r"a sequence of integers, got \[2.5\]"),
    "lengths of one number": (lambda: fmha.BlockDiagonalMask(3), TypeError, "a sequence of integers, got int"),
    "captured, model": (lambda: captured_step(None, None, IMAGES), TypeError, "model must be a .*Module, got NoneType"),
    "captured, clipping": (lambda: clipped_by(-1), ValueError, "clip_grad must be positive, got -1"),
    "captured, clipping by text": (lambda: clipped_by("1"), TypeError, "clip_grad must be a number, got '1'"),
    "restore": (lambda: mimkernels.restore(None), TypeError, "restore takes a module, got NoneType"),
    "use_backend": (lambda: backend(["cpu"]), TypeError, "a backend is named by a str, got list"),
}


@pytest.mark.parametrize("label", CALLS)
def test_wrong_kinds_of_arguments_are_refused_in_words(label):
    call, error, message = CALLS[label]
    with pytest.raises(error) as told:
        call()
    assert re.search(message, str(told.value), flags=re.DOTALL), str(told.value)


def test_a_sampler_shows_what_it_draws():
    assert repr(MaskSampler((14, 14), "block_exact", count=75)) == "MaskSampler((14, 14), 'block_exact', count=75)"
    drawn = MaskSampler([4, 6], "unit", ratio=0.5, unit=2, stream=1)
    assert repr(drawn) == "MaskSampler((4, 6), 'unit', ratio=0.5, unit=2, stream=1)"
