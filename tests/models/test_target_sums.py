"""Models that predict a weighted sum of targets."""

import pytest
import torch

from mimkernels.models import MAE, SimMIM
from mimkernels.models.build import build_model
from mimkernels.models.target_sum import TargetSum
from mimkernels.models.targets import FeatureTarget, Target, Term, parse_targets

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def model_of(method, target, target_dim=None):
    own = DECODER if method is MAE else {"mask_unit": 4}
    return method.from_timm("vit_tiny_patch16_224", **SMALL, **own, target=target, target_dim=target_dim)


def heads_of(model):
    return model.decoder_pred if isinstance(model, MAE) else model.decoders


def head_of(model):
    return model.decoder_pred if isinstance(model, MAE) else model.decoder


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def test_sums_in_words():
    assert parse_targets("patch-norm") == (Term("patch-norm", Target(norm_pix=True), 1.0, "patch_norm"),)
    terms = parse_targets("pixels  +  0.5*features:runs/a+b:layer=8 + 2e0 * ema + features:c*d")
    assert [(term.text, term.weight, term.name) for term in terms] == [
        ("pixels", 1.0, "pixels"),
        ("features:runs/a+b:layer=8", 0.5, "features"),
        ("ema", 2.0, "ema"),
        ("features:c*d", 1.0, "features_2"),
    ]
    assert terms[1].target.features == FeatureTarget("runs/a+b", layer=8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pixels + 0*ema", r"a weight must be a positive number .* got '0\*ema'"),
        ("-1*pixels + ema", r"got '-1\*pixels'"),
        ("1x*pixels + ema", r"got '1x\*pixels'"),
        ("pixels + inf*ema", r"got 'inf\*ema'"),
        ("2*pixels", r"or a sum of several with weights .* got '2\*pixels'"),
        ("pixels + ", "got ''"),
        ("pixels + words", "got 'words'"),
        ("pixels + 2*pixels", "has 'pixels' twice: give it once"),
        ("ema + 0.5*ema:layers=2", "'ema' and 'ema:layers=2' both keep a copy of the trained encoder"),
        (" + ".join(["pixels"] * 9), "a sum of 9 targets; at most 8"),
    ],
)
def test_what_is_no_sum_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_targets(text)


@pytest.mark.parametrize("masks", ["even", "uneven"])
@pytest.mark.parametrize("tokens", ["masked", "all"])
@pytest.mark.parametrize("method", [MAE, SimMIM])
def test_gradients_are_the_weighted_sum_of_those_of_single_targets(method, tokens, masks):
    features_target = f"features:x:loss=mse,tokens={tokens}"
    torch.manual_seed(0)
    both = model_of(method, f"0.5*pixels + 3*{features_target}", 12)
    images, features = torch.randn(3, 3, 16, 16), torch.randn(3, 16, 12)
    mask = torch.rand(3, 16).argsort(1) < 12
    if masks == "uneven":
        mask[0, :5] = True
    mask = mask.unflatten(1, (4, 4))
    singles = []
    for place, (target, dim) in enumerate((("pixels", None), (features_target, 12))):
        single = model_of(method, target, dim)
        own = single.state_dict()
        own.update({name: tensor for name, tensor in both.state_dict().items() if name in own})
        single.load_state_dict(own)
        head_of(single).load_state_dict(heads_of(both)[place].state_dict())
        out = single(images, mask=mask, **({"features": features} if dim else {}), full_prediction=True)
        out.loss.backward()
        assert out.metrics == {}
        singles.append((single, out))
    (pixels, of_pixels), (teacher, of_features) = singles
    out = both(images, mask=mask, features=features, full_prediction=True)
    out.loss.backward()
    torch.testing.assert_close(out.loss, 0.5 * of_pixels.loss + 3 * of_features.loss)
    torch.testing.assert_close(
        dict(out.metrics), {"loss_pixels": of_pixels.loss.detach(), "loss_features": of_features.loss.detach()}
    )
    torch.testing.assert_close(out.pred, of_pixels.pred)
    torch.testing.assert_close(both(images, mask=mask, features=features).loss, out.loss)
    first, second, summed = gradients(pixels), gradients(teacher), gradients(both)
    shared = [name for name in summed if name.startswith("encoder.")]
    assert shared and all(name in first and name in second for name in shared)
    for name in shared:
        torch.testing.assert_close(summed[name], 0.5 * first[name] + 3 * second[name], rtol=1e-4, atol=1e-6)
    for head, single, weight in zip(heads_of(both), (pixels, teacher), (0.5, 3), strict=True):
        assert head.weight.grad.norm() > 0
        torch.testing.assert_close(head.weight.grad, weight * head_of(single).weight.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(head.bias.grad, weight * head_of(single).bias.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [MAE, SimMIM])
def test_pictures_are_those_of_the_target_of_pixels(method):
    torch.manual_seed(0)
    both, single = model_of(method, "ema + 2*pixels"), model_of(method, "pixels")
    own = single.state_dict()
    own.update({name: tensor for name, tensor in both.state_dict().items() if name in own})
    single.load_state_dict(own)
    head_of(single).load_state_dict(heads_of(both)[1].state_dict())
    images = torch.randn(2, 3, 16, 16)
    for of_both, of_single in zip(both.reconstruct(images, seed=1), single.reconstruct(images, seed=1), strict=True):
        assert torch.equal(of_both, of_single)


def test_a_sum_of_pixels_has_a_loss_of_the_mean():
    model = model_of(SimMIM, "pixels + 2*patch-norm")
    images, colour = torch.rand(2, 3, 16, 16), torch.tensor([0.1, 0.2, 0.3])
    mask = model.draw_mask(images)
    one, other = (model_of(SimMIM, target).loss_of_mean(images, mask, colour) for target in ("pixels", "patch-norm"))
    torch.testing.assert_close(model.loss_of_mean(images, mask, colour), one + 2 * other)


def test_features_are_given_in_the_order_of_the_targets():
    model = model_of(SimMIM, "features:x + pixels + 2*features:y:layer=1", [12, None])
    assert [head.out_features for head in model.decoders] == [12, 48, 16]
    images, first, second = torch.randn(1, 3, 16, 16), torch.randn(1, 16, 12), torch.randn(1, 16, 16)
    assert list(model(images, features=[first, second]).metrics) == ["loss_features", "loss_pixels", "loss_features_2"]
    with pytest.raises(ValueError, match="features must be those of each target .* has 2, got 1"):
        model(images, features=first)
    with pytest.raises(ValueError, match="features not given"):
        model(images)


@pytest.mark.parametrize(
    ("target", "widths", "message"),
    [
        ("features:x + features:y", 12, "target_dim must be one width for each target .*, of which .* has 2, got 12"),
        ("features:x + pixels", [12, 3], r"of which .* has 1, got \[12, 3\]"),
        ("pixels + patch-norm", 12, "target_dim is the width of a teacher's features, got 12"),
        ("features:x + features:y", [12, 0], r"target_dim must be at least 1, got \[12, 0\]"),
    ],
)
def test_widths_that_do_not_fit_are_refused(target, widths, message):
    with pytest.raises(ValueError, match=message):
        TargetSum(target, widths)


def test_settings_of_a_file_build_no_giant_head():
    settings = {
        "method": "simmim", "model": "vit_tiny_patch16_224", "img_size": 16, "in_chans": 3, "patch_size": 4,
        "model_kwargs": {"embed_dim": 16, "depth": 1, "num_heads": 2}, "mask_ratio": 0.5, "mask_unit": None,
        "loss": "l1", "target": "features:x + ema",
    }  # fmt: skip
    assert build_model({**settings, "target_dim": [12, None]}).decoders[1].out_features == 16
    for widths in ([12, 10**9], [12, "a"]):
        with pytest.raises(ValueError, match="'target_dim' must be a whole number up to 65,536"):
            build_model({**settings, "target_dim": widths})


def test_published_names_of_a_sum_are_read_again():
    sizes = {"img_size": 64, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2}
    models = [
        SimMIM.from_timm("swin_tiny_patch4_window7_224", **sizes, target="pixels + ema", mask_unit=32) for _ in range(3)
    ]
    first, second, third = models
    published = first.simmim_state_dict()
    assert published["decoders.1.weight"].shape == (64, 64) and "encoder.layers.0.downsample.norm.weight" in published
    second.load_checkpoint(published)
    third.load_checkpoint(first.state_dict())
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]) and torch.equal(tensor, third.state_dict()[name]), name
    alone = SimMIM.from_timm("swin_tiny_patch4_window7_224", **sizes, mask_unit=32)
    with pytest.raises(ValueError, match=r"(?s)in the model but not in the checkpoint.*decoder\.0\.weight"):
        alone.load_checkpoint(published)
    mae = model_of(MAE, "pixels + ema")
    again = model_of(MAE, "pixels + ema")
    again.load_checkpoint(mae.mae_state_dict())
    assert torch.equal(again.decoder_pred[1].weight, mae.decoder_pred[1].weight)
