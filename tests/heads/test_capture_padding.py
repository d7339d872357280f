"""Images of several sizes in one batch: padding is no patch, and every image's statistics are those of it alone."""

import warnings

import pytest
import torch
from torch import nn

import mimkernels
from mimkernels.heads.padding import padding_of, without_padding
from mimkernels.nn.sdpa import AttentionCall
from mimkernels.ops import attention
from tests.heads.test_capture_layout import assert_laid_out, images
from tests.integrations import models as m

# Of every kind: means of rows, maxima, and what needs q and k.
NAMES = [
    *("entropy", "normalized_entropy", "distance", "renormalized_distance", "max_score", "argmax_is_prefix"),
    *("nmi", "head_divergence", "patch_head_divergence", "sink_attention", "pos_pos_entropy", "cls_pos_entropy"),
]
SIZES = ((24, 40), (16, 24), (16, 24))
PATCH, LONGEST = 8, 18


def naflex(**options):
    options = {"patch_size": PATCH, "pos_embed_grid_size": (4, 4), "reg_tokens": 2, **options}
    return m.timm_model("naflexvit_base_patch16_gap", **options)


def as_patches(pictures, patch=PATCH):
    """The batch that timm's collator makes of images: patches, their rows and columns, and which are there."""
    batch = {
        "patches": torch.zeros(len(pictures), LONGEST, patch * patch * 3),
        "patch_coord": torch.zeros(len(pictures), LONGEST, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(pictures), LONGEST, dtype=torch.bool),
    }
    for number, picture in enumerate(pictures):
        rows, columns = (size // patch for size in picture.shape[1:])
        pixels = picture.reshape(3, rows, patch, columns, patch).permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)
        batch["patches"][number, : len(pixels)] = pixels
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        batch["patch_coord"][number, : len(pixels)] = places
        batch["patch_valid"][number, : len(pixels)] = True
    return batch


@pytest.mark.parametrize("projection", ["linear", "conv"])
def test_flexible_models_follow_the_image(projection):
    model = naflex(embed_proj_type=projection, class_token=True)
    assert_laid_out(model, lambda model: model(images(24, 40)), prefix=3, grid=(3, 5), patch_size=PATCH)


@pytest.mark.parametrize("unit", ["patch", "pixel", "unit"])
@pytest.mark.parametrize("options", [{}, {"use_key_only_attn_mask": True}], ids=["", "keys alone masked"])
def test_statistics_of_a_padded_batch_are_those_of_each_image(options, unit):
    model = naflex(class_token=True, **options)
    pictures = [images(*size, batch=1, seed=seed)[0] for seed, size in enumerate(SIZES)]
    alone = []
    with torch.no_grad():
        for picture in pictures:
            with mimkernels.capture(model, NAMES, unit=unit) as heads:
                model(picture[None])
            alone.append(heads)
        with mimkernels.capture(model, NAMES, unit=unit) as heads:
            model(as_patches(pictures))
    for name in NAMES:
        expected = torch.stack([one.statistics.mean(name) for one in alone]).mean(0)
        torch.testing.assert_close(heads.statistics.mean(name), expected, rtol=1e-4, atol=1e-5, msg=name)
    layer = heads["blocks.1.attn"]
    assert layer.num_prefix == 3 and "padding" in layer.notes[0]
    assert layer.padding.sum(1).tolist() == [3, 12, 12] and not layer.padding[:, :3].any()
    for number, one in enumerate(alone):
        there = ~layer.padding[number]
        rows = layer.stats["distance"][number][:, there]
        torch.testing.assert_close(rows, one["blocks.1.attn"].stats["distance"][0], rtol=1e-4, atol=1e-4)


def test_flexible_models_compute_the_same_when_accelerated():
    model = naflex()
    batch = as_patches([images(*size, batch=1, seed=seed)[0] for seed, size in enumerate(SIZES)])
    with torch.no_grad():
        expected = model(batch)
        report = mimkernels.accelerate(model)
        assert [change.name for change in report.accelerated if "attn" in change.name] == [
            "blocks.0.attn",
            "blocks.1.attn",
        ]
        with mimkernels.use_backend("cpu"):
            torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-5)


def test_patches_of_another_size_have_its_pixels():
    model = naflex(enable_patch_interpolator=True, reg_tokens=0)
    batch = as_patches([images(24, 40, batch=1)[0]])
    coarse = {**batch, "patches": torch.randn(1, LONGEST, 12, 12, 3)}
    distances = []
    for given, unit in ((coarse, "pixel"), (coarse, "patch")):
        with torch.no_grad(), mimkernels.capture(model, ["distance"], unit=unit) as heads:
            model(given)
        distances.append(heads[0].stats["distance"])
    torch.testing.assert_close(distances[0], 12 * distances[1])


def test_a_pooling_head_without_the_prefix_tokens_sees_that():
    model = naflex(global_pool="map", class_token=True)
    with torch.no_grad(), mimkernels.capture(model, ["entropy", "prefix_mass"]) as heads:
        model(images(24, 40))
    pool = heads["attn_pool"]
    assert (pool.queries, pool.keys, pool.num_prefix) == (1, 15, 0) and heads[0].num_prefix == 3


def test_tokens_behind_a_table_without_its_first_rows_are_still_asked_for():
    class Cut(nn.Module):
        """One patch is lost unseen; a table of positions, of one image, loses its first row as tables do."""

        def __init__(self):
            super().__init__()
            self.patch_embed = nn.Conv2d(3, 48, 8, 8)
            self.cls_token = nn.Parameter(torch.randn(1, 1, 48))
            self.block = m.HandWritten()

        def forward(self, x):
            x = self.patch_embed(x).flatten(2).transpose(1, 2)
            x = x + torch.zeros(1, 16, 48)[:, 1:]
            return self.block(torch.cat((self.cls_token.expand(len(x), -1, -1), x[:, :-1]), 1))

    model = Cut()
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="num_prefix is not known: 15 tokens"),
        mimkernels.capture(model, ["entropy"]),
    ):
        model(images(24, 40))


def test_padding_of_torch_s_layers_is_left_out():
    """A known answer: of the first image 12 tokens are there, the rest is not looked at and does not count."""
    layer = m.torch_encoder().layers[0].self_attn
    x, hidden = m.tokens(), torch.zeros(2, 17, dtype=torch.bool)
    hidden[0, 12:] = True
    with torch.no_grad(), mimkernels.capture(layer, NAMES, num_prefix=1, positions=(4, 4)) as heads:
        layer(x, x, x, key_padding_mask=hidden, need_weights=False)
    layouts = ((x[:1, :12], mimkernels.heads.patch_grid_positions((4, 4))[:11]), (x[1:], (4, 4)))
    parts = []
    for tokens, positions in layouts:
        with torch.no_grad(), mimkernels.capture(layer, NAMES, num_prefix=1, positions=positions) as one:
            layer(tokens, tokens, tokens, need_weights=False)
        parts.append(one.statistics)
    for name in NAMES:
        expected = (parts[0].mean(name) + parts[1].mean(name)) / 2
        torch.testing.assert_close(heads.statistics.mean(name), expected, rtol=1e-4, atol=1e-5, msg=name)
    assert torch.equal(heads[0].padding, hidden)


def call(batch=4, tokens=5, **scores):
    q, k, v = torch.randn(3, batch, 2, tokens, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    none = {"bias": None, "key_mask": None}
    return AttentionCall(q, k, v, **{**none, **scores}, scale=8**-0.5, leading=(batch, 2))


def test_what_counts_as_padding():
    assert padding_of(call(), 0) is None
    empty = call(key_mask=torch.zeros(4, 5, dtype=torch.bool, device="meta"))
    assert padding_of(empty._replace(q=empty.q.to("meta")), 0) is None  # of tensors without values, nothing is known
    seen = torch.ones(4, 5, dtype=torch.bool)
    assert padding_of(call(key_mask=seen), 0) is None
    seen[1, 3:] = seen[2, 0] = False
    expected = ~seen
    assert torch.equal(padding_of(call(key_mask=seen), 0), expected)
    expected[2, 0] = False  # a prefix token is none, whoever may see it
    assert torch.equal(padding_of(call(key_mask=seen), 1), expected)
    # Of windows: image b takes row b modulo W. A key that one query, or one head, sees is no padding.
    bias = torch.zeros(2, 2, 5, 5)
    bias[1, :, :, 4] = torch.finfo(torch.float32).min
    assert padding_of(call(bias=bias), 0).nonzero().tolist() == [[1, 4], [3, 4]]
    bias[1, 1, 4, 4] = 0
    assert padding_of(call(bias=bias), 0) is None
    causal = torch.full((1, 1, 5, 5), float("-inf")).triu(1)
    assert padding_of(call(bias=causal), 0) is None
    assert padding_of(call(bias=torch.full((4, 1, 1, 5), -1e9).expand(4, 1, 5, 5)), 1)[:, 1:].all()


def test_what_is_left_without_padding_gives_the_same_rows():
    """Bias, table of biases and key mask are cut with the tokens; an image of padding alone is left out."""
    generator = torch.Generator().manual_seed(1)
    seen = torch.ones(4, 5, dtype=torch.bool)
    seen[1, 3:] = seen[2, 2] = False
    seen[3] = False
    given = call(
        bias=torch.randn(2, 1, 5, 5, generator=generator),
        key_mask=seen,
        bias_table=torch.randn(7, 2, generator=generator),
        bias_index=torch.randint(7, (5, 5), generator=generator),
    )
    output = attention(given.q, given.k, given.v, **given.options, stats=("entropy",))
    padding = padding_of(given, 0)
    images_seen = 0
    for rows, lse, part in without_padding(padding, 0, output.stats, output.lse, given):
        again = attention(part.q, part.k, part.v, **part.options, stats=("entropy",))
        torch.testing.assert_close(again.stats["entropy"], rows["entropy"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again.lse, lse, rtol=1e-5, atol=1e-5)
        images_seen += len(part.q)
    assert images_seen == 3


def test_a_model_that_fails_inside_raises_its_own_error_alone():
    class Fails(m.HandWritten):
        def forward(self, x):
            super().forward(x)
            raise KeyError("its own")

    model = nn.Sequential(Fails())
    with warnings.catch_warnings(), pytest.raises(KeyError, match="its own"):
        warnings.simplefilter("error")
        with mimkernels.capture(model, ["entropy"], num_prefix=1) as heads:
            model(m.tokens())
    assert list(heads) == ["0"]


def noted(model, size):
    with torch.no_grad(), mimkernels.capture(model, ["entropy", "distance"]) as heads:
        model(images(size, size, batch=2))
    return [layer.notes for layer in heads.values()]


def test_a_layer_says_that_its_windows_hold_more_than_the_image():
    sam = m.timm_model("samvit_base_patch16_224", window_size=3, global_attn_indexes=(1,))
    held = "its windows hold 36 tokens of 4 x 4 patches: what fills them up counts as patches"
    assert noted(sam, 64) == [[held], []]
    swin = {"patch_size": 4, "window_size": 3, "depths": (2, 2), "num_heads": (2, 2), "embed_dim": 16, "depth": None}
    padded = m.timm_model("swin_tiny_patch4_window7_224", img_size=32, **swin)
    assert [len(notes) for notes in noted(padded, 32)] == [1, 1, 1, 1]
    assert "hold 81 tokens of 8 x 8 patches" in noted(padded, 32)[0][0]
    assert "hold 36 tokens of 4 x 4 patches" in noted(padded, 32)[2][0]
    whole = m.timm_model("swin_tiny_patch4_window7_224", img_size=24, **swin)
    assert noted(whole, 24) == [[], [], [], []]
