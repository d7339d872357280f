"""Models that predict a teacher's features."""

import pytest
import torch
from torch.nn import functional as F

from mimkernels.models import MAE, SimMIM
from mimkernels.models.targets import FeatureTarget, parse_target

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("features:vit_base_patch16_224", FeatureTarget("vit_base_patch16_224")),
        ("features:hf-hub:timm/x:norm=none", FeatureTarget("hf-hub:timm/x", norm="none")),
        ("features:a:b", FeatureTarget("a:b")),
        ("ema", FeatureTarget(None, layers=10, part="mlp")),
        ("ema:layer=-2,layers=3,beta=2,loss=cosine,tokens=all",
         FeatureTarget(None, -2, 3, "mlp", beta=2.0, loss="cosine", tokens="all")),
    ],
)  # fmt: skip
def test_targets_in_words(text, target):
    assert parse_target(text).features == target


@pytest.mark.parametrize(("text", "model", "layer"), [
    ("features:/a=b:c=d/run", "/a=b:c=d/run", -1), ("features:/a b:c=d/run:layer=2", "/a b:c=d/run", 2),
])  # fmt: skip
def test_a_path_with_a_colon_is_no_option(text, model, layer):
    features = parse_target(text).features
    assert (features.model, features.layer) == (model, layer)


def test_a_path_that_ends_like_an_option_is_the_model_where_it_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x:y=2").mkdir()
    assert parse_target("features:x:y=2").features.model == "x:y=2"
    features = parse_target("features:x:y=2:layer=2").features
    assert (features.model, features.layer) == ("x:y=2", 2)
    with pytest.raises(ValueError, match="an option must be .* got 'y=2'"):
        parse_target("features:z:y=2")


def test_simmim_compares_the_masked_tokens():
    torch.manual_seed(0)
    model = SimMIM.from_timm("vit_tiny_patch16_224", **SMALL, mask_unit=8, target="features:x:beta=0.5", target_dim=12)
    images, features = torch.randn(3, 3, 16, 16), torch.randn(3, 16, 12)
    drawn = model(images, seed=1, features=features, full_prediction=True)
    hidden = drawn.mask.flatten(1)
    normal = F.layer_norm(features, (12,))
    plain = F.smooth_l1_loss(drawn.pred[hidden], normal[hidden], beta=0.5)
    torch.testing.assert_close(drawn.loss, plain)
    for arguments in ({}, {"ids": model.masked_ids(drawn.mask)}, {"full_prediction": True}):
        torch.testing.assert_close(model(images, mask=drawn.mask, features=features, **arguments).loss, plain)
    uneven = drawn.mask.clone()
    uneven[0] = False
    out = model(images, mask=uneven, features=features, full_prediction=True)
    chosen = uneven.flatten(1)
    torch.testing.assert_close(out.loss, F.smooth_l1_loss(out.pred[chosen], normal[chosen], beta=0.5))


def test_a_token_of_swin_is_masked_where_one_of_its_patches_is():
    sizes = {"img_size": 64, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2}
    model = SimMIM.from_timm("swin_tiny_patch4_window7_224", **sizes, mask_unit=32, target="ema")
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[0, 3, 9] = mask[1, 15, 0] = True
    assert model.masked_ids(mask).tolist() == [1, 6]
    assert model.decoder.out_features == model.encoder.num_features == 64
    out = model(torch.randn(2, 3, 64, 64), mask=mask, features=torch.randn(2, 4, 64))
    assert out.loss.isfinite()


@pytest.mark.parametrize("tokens", ["masked", "all"])
def test_mae_compares_the_masked_patches(tokens):
    torch.manual_seed(0)
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    model = MAE.from_timm(
        "vit_tiny_patch16_224", **SMALL, **decoder, target=f"ema:loss=mse,norm=none,tokens={tokens}", target_dim=12
    )
    images, features = torch.randn(3, 3, 16, 16), torch.randn(3, 16, 12)
    even = torch.rand(3, 16).argsort(1) < 12
    uneven = even.clone()
    uneven[0, :4] = True
    for mask in (even, uneven):
        mask = mask.unflatten(1, (4, 4))
        out = model(images, mask=mask, features=features, full_prediction=True)
        chosen = mask.flatten(1) if tokens == "masked" else torch.ones(3, 16, dtype=torch.bool)
        torch.testing.assert_close(out.loss, F.mse_loss(out.pred[chosen], features[chosen]))
        torch.testing.assert_close(model(images, mask=mask, features=features).loss, out.loss)


def test_features_and_target_must_agree():
    model = SimMIM.from_timm("vit_tiny_patch16_224", **SMALL)
    with pytest.raises(ValueError, match="target 'pixels', features given"):
        model(torch.randn(1, 3, 16, 16), features=torch.randn(1, 16, 16))
    with pytest.raises(ValueError, match="target_dim is the width of a teacher's features, got 3"):
        SimMIM.from_timm("vit_tiny_patch16_224", **SMALL, target_dim=3)
    with pytest.raises(ValueError, match="target must be pixels, features:MODEL, ema or bootstrap"):
        MAE.from_timm("vit_tiny_patch16_224", **SMALL, target="patch-norm")
