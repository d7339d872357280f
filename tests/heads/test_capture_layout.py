"""Prefix tokens and positions follow the images that the model was called with; what was not seen is asked for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mimkernels
from mimkernels.heads import patch_grid_positions
from mimkernels.nn.sdpa import observing
from tests.heads.test_capture import materialised, rows_of
from tests.integrations import models as m

STATS = ["entropy", "prefix_mass", "distance"]


def images(height, width, batch=2, seed=4):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def captured(run, model, stats=STATS, **options):
    with torch.no_grad(), mimkernels.capture(model, stats, **options) as heads:
        run(model)
    return heads


def assert_laid_out(model, run, prefix, grid, patch_size=None, **options):
    """Statistics are those of the materialised maps under this layout."""
    maps = materialised(model, run)
    for unit in ("patch", "pixel") if patch_size else ("patch",):
        heads = captured(run, model, unit=unit, **options)
        assert [layer.num_prefix for layer in heads.values()] == [prefix] * len(maps)
        for layer, p in zip(heads.values(), maps, strict=True):
            for name, expected in rows_of(p, prefix, grid).items():
                scale = patch_size if unit == "pixel" and name == "distance" else 1
                torch.testing.assert_close(layer.stats[name].double(), scale * expected, rtol=5e-5, atol=5e-5 * scale)


def dynamic_vit(**options):
    return m.timm_model("vit_tiny_patch16_224", dynamic_img_size=True, **{"patch_size": 8, **options})


def test_the_grid_is_that_of_the_image():
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=1, num_classes=0, dynamic_img_size=True
    ).eval()  # built for 4 x 4 = 16 patches; 3 x 5 and [cls] are 16 tokens
    assert_laid_out(model, lambda model: model(images(48, 80)), prefix=1, grid=(3, 5), patch_size=16)


@pytest.mark.parametrize("sizes", [(32, 32), (16, 64), (64, 16)])
def test_as_many_tokens_of_another_shape_have_other_distances(sizes):
    assert_laid_out(dynamic_vit(), lambda model: model(images(*sizes)), 1, (sizes[0] // 8, sizes[1] // 8), 8)


def test_one_capture_follows_images_of_several_shapes():
    model = dynamic_vit()

    def both(model):
        model(images(16, 64))
        model(images(64, 16))

    heads = captured(both, model)
    expected = [captured(lambda model, s=s: model(images(*s)), model) for s in ((16, 64), (64, 16))]
    for name, layer in heads.items():
        rows = torch.cat([one[name].stats["distance"] for one in expected])
        assert torch.equal(layer.stats["distance"], rows)


OTHER_MODELS = {
    "registers": (lambda: m.timm_model("vit_small_patch14_reg4_dinov2", patch_size=8, dynamic_img_size=True), 5),
    "without [cls]": (lambda: dynamic_vit(class_token=False, global_pool="avg"), 0),
    "padded to whole patches": (lambda: dynamic_vit(dynamic_img_pad=True), 1),
    "rotary positions": (lambda: m.timm_model("eva02_tiny_patch14_224", patch_size=8, dynamic_img_size=True), 1),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_timm_models_of_other_kinds(name):
    make, prefix = OTHER_MODELS[name]
    height, width = (23, 38) if "padded" in name else (24, 40)
    assert_laid_out(make(), lambda model: model(images(height, width)), prefix, (3, 5), 8)


def test_prefix_tokens_that_are_missing_are_asked_for():
    model = dynamic_vit()

    def without_cls(model):
        model.blocks[0](model.patch_embed(images(24, 40)).flatten(1, 2))

    with pytest.raises(ValueError, match=r"num_prefix is not known: 15 tokens, but 1 prefix tokens \+ 3 x 5 patches"):
        captured(without_cls, model, ["entropy"])
    heads = captured(without_cls, model, STATS, num_prefix=0)
    p = materialised(model, without_cls)[0]
    torch.testing.assert_close(
        heads[0].stats["distance"].double(), rows_of(p, 0, (3, 5))["distance"], rtol=5e-5, atol=1e-4
    )


@pytest.mark.parametrize("name", ["ViT", "Dinov2", "Dinov2WithRegisters"])
@pytest.mark.parametrize("grid", [(3, 5), (2, 8), (4, 4)])
def test_transformers_models_follow_the_image(name, grid):
    model = m.transformers_model(f"{name}Model", f"{name}Config")
    options = {"interpolate_pos_encoding": True} if name == "ViT" else {}
    prefix = 5 if "Registers" in name else 1
    x = images(8 * grid[0], 8 * grid[1])
    assert_laid_out(model, lambda model: model(x, **options), prefix, grid, 8)


def expected_distances(p, prefix, positions):
    """``[B, H, N]`` of maps whose patches lie at ``[B, K, 2]``."""
    places = positions.double()
    return (p * F.pad(torch.cdist(places, places), (prefix, 0, prefix, 0))[:, None]).sum(-1)


def test_dropped_patches_are_no_grid():
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0, patch_drop_rate=0.25, pos_drop_rate=0.0
    ).train()  # 3 of 4 patches and [cls]: as many tokens as there are patches

    def run(model):
        torch.manual_seed(3)
        return model(images(32, 32))

    ids = []
    kept = model.patch_drop.register_forward_hook(lambda module, args, out: ids.append(out))
    p = materialised(model, run)[0]
    kept.remove()
    heads = captured(run, model)
    torch.manual_seed(3)
    kept_ids = torch.argsort(torch.randn(2, 4), dim=-1)[:, :3]
    assert ids[0].shape == (2, 4, 192) and heads[0].num_prefix == 1
    torch.testing.assert_close(heads[0].stats["prefix_mass"].double(), p[..., 0], rtol=5e-5, atol=5e-5)
    expected = expected_distances(p, 1, patch_grid_positions((2, 2))[kept_ids])
    torch.testing.assert_close(heads[0].stats["distance"].double(), expected, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("accelerated", [False, True])
def test_patches_that_were_dropped_have_their_own_positions(accelerated):
    model = dynamic_vit(patch_drop_rate=0.5).train()
    if accelerated:
        mimkernels.accelerate(model)

    def run(model):
        torch.manual_seed(3)
        return model(images(24, 40))

    heads = captured(run, model)
    torch.manual_seed(3)
    ids = torch.randn(2, 15).argsort(-1)[:, :7]
    given = captured(run, model, positions=patch_grid_positions((3, 5))[ids], num_prefix=1)
    for name, layer in heads.items():
        assert (layer.keys, layer.num_prefix) == (8, 1)
        torch.testing.assert_close(layer.stats["distance"], given[name].stats["distance"], rtol=1e-5, atol=1e-5)


def test_dropped_patches_that_were_not_seen_are_asked_for():
    """Accelerated patch dropout of a model that embeds all patches first: how many are kept is seen, not which."""
    model = m.timm_model("eva02_tiny_patch14_224", patch_size=8, patch_drop_rate=0.5).train()
    assert type(model.patch_drop).__name__ == "PatchDropoutWithIndices"
    mimkernels.accelerate(model)
    assert captured(lambda model: model(m.images()), model, ["entropy"])["blocks.0.attn"].num_prefix == 1
    with pytest.raises(
        ValueError, match="blocks.0.attn: which 8 of the 4 x 4 patches were kept was not seen: give.*the kept patches'"
    ):
        captured(lambda model: model(m.images()), model)


@pytest.mark.parametrize("mask_ratio", [0.75, 0.5, 0.0])
def test_masked_autoencoders_of_transformers(mask_ratio):
    """Without masking too, the encoder sees the patches shuffled."""
    model = m.vit_mae(mask_ratio=mask_ratio)
    noise = torch.rand(2, 15, generator=torch.Generator().manual_seed(0))
    kept = int(15 * (1 - mask_ratio))

    def run(model):
        model(images(24, 40), noise=noise, interpolate_pos_encoding=True)

    def assert_right(stats, layers, expected):
        heads = captured(run, model, stats, layers=layers)
        assert [layer.num_prefix for layer in heads.values()] == [1] * len(expected)
        for layer, rows in zip(heads.values(), expected, strict=True):
            torch.testing.assert_close(layer.stats["distance"].double(), rows, rtol=5e-5, atol=5e-5)

    maps, grid = materialised(model, run), patch_grid_positions((3, 5))
    assert [p.shape[-1] for p in maps] == [1 + kept, 1 + kept, 16]
    shuffled = grid[noise.argsort(dim=1)[:, :kept]]
    assert_right(STATS, "vit", [expected_distances(p, 1, shuffled) for p in maps[:2]])
    if mask_ratio:
        assert_right(STATS, "decoder", [expected_distances(maps[2], 1, grid.expand(2, -1, -1))])
    else:  # a second permutation, which may undo the first or be that of something else
        with pytest.raises(ValueError, match="decoder.*: which 15 of the 3 x 5 patches were kept was not seen"):
            captured(run, model, layers="decoder")


def test_our_own_masked_autoencoder():
    from mimkernels.models import MAE

    torch.manual_seed(0)
    model = MAE.from_timm(
        "vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3, patch_size=8, dynamic_img_size=True,
        decoder_dim=48, decoder_depth=2, decoder_heads=3,
    )  # fmt: skip
    x = images(24, 40)
    ids = model.draw_mask(x, seed=0, offset=0).ids_keep

    def run(model):
        return model(x, seed=0, offset=0)

    heads = captured(run, model)
    assert [(layer.keys, layer.num_prefix) for layer in heads.values()] == [(4, 1), (4, 1), (16, 1), (16, 1)]
    kept = patch_grid_positions((3, 5))[ids]
    encoder = captured(run, model, positions=kept, num_prefix=1, layers="encoder")
    decoder = captured(run, model, positions=(3, 5), num_prefix=1, layers="decoder")
    for name, layer in {**encoder, **decoder}.items():
        for statistic, rows in layer.stats.items():
            assert torch.equal(heads[name].stats[statistic], rows)


CHOICES = {
    "gather": lambda x, ids: x.gather(1, ids[..., None].expand(-1, -1, x.shape[2])),
    "gather, repeated": lambda x, ids: torch.gather(x, dim=1, index=ids.unsqueeze(-1).repeat(1, 1, x.shape[2])),
    "take_along_dim": lambda x, ids: torch.take_along_dim(x, ids[..., None], 1),
    "rows and ids": lambda x, ids: x[torch.arange(len(x))[:, None], ids],
    "rows, ids and a slice": lambda x, ids: x[torch.arange(len(x))[:, None], ids, :],
    "in two steps": lambda x, ids: CHOICES["gather"](
        CHOICES["gather"](x, torch.cat((ids, ids[:, :1]), 1)), torch.arange(ids.shape[1]).expand(len(x), -1)
    ),
}
SHARED = {
    "index_select": lambda x, ids: x.index_select(1, ids),
    "index of all images": lambda x, ids: x[:, ids],
    "bool mask of all images": lambda x, ids: x[:, F.one_hot(ids, x.shape[1]).sum(0).bool()],
}
MASKED = {"bool mask": lambda x, ids: x[F.one_hot(ids, x.shape[1]).sum(1).bool()].reshape(len(x), -1, x.shape[2])}


class Chooses(nn.Module):
    """Embeds images and attends to the patches that `choose` leaves, behind a [cls] token."""

    def __init__(self, choose, restore=None):
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed = nn.Conv2d(3, 48, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 48))
        self.block, self.choose = m.HandWritten(), choose

    def forward(self, x, ids):
        x = self.choose(self.patch_embed(x).flatten(2).transpose(1, 2), ids)
        return self.block(torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1))


@pytest.mark.parametrize("name", [*CHOICES, *SHARED, *MASKED])
def test_chosen_patches_have_their_own_positions(name):
    ids = torch.tensor([[1, 4, 7, 9, 14], [0, 2, 3, 8, 10]])
    if name in SHARED:
        ids = ids[0]
    model = Chooses({**CHOICES, **SHARED, **MASKED}[name])

    def run(model):
        model(images(24, 40), ids)

    p = materialised(model, run)[0]
    if name == "bool mask of all images":
        with pytest.raises(ValueError, match="which 5 of the 3 x 5 patches were kept was not seen"):
            captured(run, model)
        return
    layer = captured(run, model)["block"]
    assert layer.num_prefix == 1
    expected = expected_distances(p, 1, patch_grid_positions((3, 5))[ids.expand(2, -1)])
    torch.testing.assert_close(layer.stats["distance"].double(), expected, rtol=5e-5, atol=5e-5)


def test_tokens_chosen_together_with_their_positions():
    pos = torch.randn(1, 15, 48)
    ids = torch.tensor([[1, 4, 7], [0, 2, 3]])

    def both(x, ids):
        index = ids[..., None].expand(-1, -1, 48)
        return x.gather(1, index) + pos.expand(2, -1, -1).gather(1, index)

    model = Chooses(both)
    p = materialised(model, lambda model: model(images(24, 40), ids))[0]
    layer = captured(lambda model: model(images(24, 40), ids), model)["block"]
    expected = expected_distances(p, 1, patch_grid_positions((3, 5))[ids])
    torch.testing.assert_close(layer.stats["distance"].double(), expected, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("name", ["gather", "gather, repeated"])
def test_a_choice_of_shuffled_patches_is_asked_for_unless_it_is_seen_to_be_the_same(name):
    """Shuffled together with their positions; the second permutation is of a table that was in order."""
    ids = torch.stack([torch.randperm(15, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    model = Chooses(lambda x, ids: CHOICES[name](x, ids) + CHOICES[name](torch.zeros(2, 15, 48), ids))
    run = lambda model: model(images(24, 40), ids)  # noqa: E731
    if name == "gather":
        expected = expected_distances(materialised(model, run)[0], 1, patch_grid_positions((3, 5))[ids])
        rows = captured(run, model)["block"].stats["distance"].double()
        torch.testing.assert_close(rows, expected, rtol=5e-5, atol=5e-5)
        return
    with pytest.raises(ValueError, match="which 15 of the 3 x 5 patches were kept was not seen"):
        captured(run, model)


def test_two_choices_of_as_many_patches_are_asked_for():
    def twice(x, ids):
        CHOICES["gather"](x, ids + 1)
        return CHOICES["gather"](x, ids)

    ids = torch.tensor([[1, 4, 7], [0, 2, 3]])
    with pytest.raises(ValueError, match="which 3 of the 3 x 5 patches were kept was not seen"):
        captured(lambda model: model(images(24, 40), ids), Chooses(twice))


@pytest.mark.parametrize("tokens", [14, 16, 17])
def test_tokens_that_came_and_went_unseen_are_asked_for(tokens):
    def changed(x, _):
        return F.pad(x, (0, 0, 0, tokens - 16))  # with [cls] as many tokens as that

    model = Chooses(changed)
    run = lambda model: model(images(24, 40), None)  # noqa: E731
    if tokens == 16:
        assert captured(run, model)["block"].num_prefix == 1
        return
    with pytest.raises(ValueError, match=rf"num_prefix is not known: {tokens} tokens, but 1 prefix tokens \+ 3 x 5"):
        captured(run, model, ["entropy"])
    assert captured(run, model, ["entropy"], num_prefix=1)["block"].num_prefix == 1
    with pytest.raises(ValueError, match=rf"{tokens} tokens, but .*: give positions and num_prefix"):
        captured(run, model, num_prefix=1)


def test_tokens_of_other_names_in_front_of_the_patches_are_asked_for():
    """That no parameter looks like a prefix token does not say that there is none."""
    model = Chooses(lambda x, _: x)
    model.summary = nn.Parameter(model.cls_token.detach())
    del model.cls_token
    model.forward = lambda x: model.block(
        torch.cat((model.summary.expand(len(x), -1, -1), model.patch_embed(x).flatten(2).transpose(1, 2)), 1)
    )
    with pytest.raises(ValueError, match=r"16 tokens, but 0 prefix tokens \+ 3 x 5 patches are 15: give it"):
        captured(lambda model: model(images(24, 40)), model, ["entropy"])
    assert_laid_out(model, lambda model: model(images(24, 40)), 1, (3, 5), num_prefix=1)


def test_models_of_several_branches_are_asked_for():
    model = pytest.importorskip("timm").create_model("crossvit_tiny_240", num_classes=0).eval()
    with pytest.raises(ValueError, match="num_prefix of CrossVit is not known: no patch embedding is found in it"):
        captured(lambda model: model(images(240, 240, batch=1)), model, ["entropy"])


def test_a_part_that_runs_without_images_is_asked_for():
    model = m.vit()
    with pytest.raises(ValueError, match="num_prefix is not known: no image was embedded by the model inside capture"):
        captured(lambda model: model.blocks[0](m.tokens()), model, ["entropy"])
    with pytest.raises(ValueError, match="no image was embedded by the model inside capture: give positions"):
        captured(lambda model: model.blocks[0](m.tokens()), model, num_prefix=1)
    assert captured(lambda model: model.blocks[0](m.tokens()), model, num_prefix=1, positions=(4, 4))[0].keys == 17


def test_merged_windows_have_the_pixels_of_their_stage():
    """Swin's patches are 4 pixels wide in the first stage, 8 in the second."""
    model = m.swin()
    heads = {
        unit: captured(lambda model: model(m.images()), model, ["distance"], unit=unit)
        for unit in ("pixel", "patch", "unit")
    }
    for name, layer in heads["patch"].items():
        pixels, side = {"0": (4, 8), "1": (8, 4)}[name.split(".")[1]]
        for unit, factor in (("pixel", pixels), ("unit", 1 / (side - 1))):  # 1 is from the first patch to the last
            wanted = factor * layer.stats["distance"]
            torch.testing.assert_close(heads[unit][name].stats["distance"], wanted, rtol=1e-5, atol=1e-5)


def test_a_window_of_as_many_tokens_is_none_where_there_are_prefix_tokens():
    """BEiT's attention has the window that its table of relative positions is made for."""
    model = Chooses(lambda x, _: x[:, 5:])  # which are left is not seen
    x = images(24, 56)  # 3 x 7 patches, 16 of them and [cls]
    model.block.window_size = 17, 1
    with pytest.raises(ValueError, match=r"num_prefix is not known: 17 tokens, but 1 prefix tokens \+ 3 x 7 patches"):
        captured(lambda model: model(x, None), model)


def test_the_grid_of_several_convolutions_is_that_of_the_last():
    torch.manual_seed(0)
    model = Chooses(lambda x, _: x)
    model.patch_embed = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, 48, 3, 2, 1))
    assert_laid_out(model, lambda model: model(images(12, 20), None), 1, (3, 5), 4)


def test_two_models_in_one_have_layouts_of_their_own():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = dynamic_vit(), dynamic_vit(class_token=False, global_pool="avg")

        def forward(self, x, y):
            return self.one(x), self.other(y)

    model = Pair()
    heads = captured(lambda model: model(images(24, 40), images(64, 16)), model)
    one = captured(lambda model: model(images(24, 40)), model.one)
    other = captured(lambda model: model(images(64, 16)), model.other)
    for name, layer in heads.items():
        part, _, inner = name.partition(".")
        for statistic, rows in {"one": one, "other": other}[part][inner].stats.items():
            assert torch.equal(layer.stats[statistic], rows)


def test_what_embeds_patches_by_other_means_tells_of_them():
    from mimkernels.nn.sdpa import Patches, tell_patches

    told = []

    class Listener(m.Seen):
        def see_patches(self, embedding, patches):
            told.append((embedding, patches))

    proj = nn.Conv2d(3, 48, 8, 8)
    ids = torch.tensor([[0, 3], [1, 2]])
    with observing(Listener()):
        mimkernels.nn.embed_visible(images(24, 40), ids, proj)
        tell_patches(proj, Patches(1, (2, 2)))
    assert told[0][0] is proj and told[0][1][:3] == (2, (3, 5), (8, 8)) and torch.equal(told[0][1].ids, ids)
    assert told[1] == (proj, Patches(1, (2, 2)))
