"""What MAE refuses, and that every refusal names the thing and shows both sides."""

import pytest
import torch

timm = pytest.importorskip("timm")
from mimkernels.models import MAE  # noqa: E402

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4}


def build(name="vit_tiny_patch16_224", **overrides):
    return MAE.from_timm(name, **{**SMALL, **DECODER, **overrides})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "vit_tiny_patch16_225",
            "timm has no model 'vit_tiny_patch16_225'; close names: vit_tiny_patch16_224",
        ),
        ("vit_small_r26_s32_224", "'vit_small_r26_s32_224' cannot encode visible .* convolutional stem"),
        ("vit_base_patch16_rope_224", "rotary positions"),
        ("vit_relpos_small_patch16_224", "relative position bias"),
        ("resnet18", "'resnet18' is no Vision Transformer"),
    ],
)
def test_models_that_cannot_encode_visible_patches_alone(name, message):
    with pytest.raises(ValueError, match=message):
        build(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 7}, "patch size 7 x 7 does not divide image size 32 x 32"),
        ({"img_size": (32, 36)}, "patch size 8 x 8 does not divide image size 32 x 36"),
        ({"img_size": 0}, "img_size must be a positive integer"),
        ({"patch_size": (8, 8, 8)}, "patch_size must be a positive integer or"),
        ({"mask_ratio": 1.0}, r"mask_ratio must lie between 0 and 1.* 16 patches.*got 1.0$"),
        ({"mask_ratio": 0.0}, r"mask_ratio must lie between 0 and 1.*got 0.0$"),
        ({"mask_ratio": 0.99}, r"mask_ratio must lie between 0 and 1.*got 0.99 \(0 visible\)"),
        ({"mask_ratio": float("nan")}, r"mask_ratio must lie between 0 and 1.*got nan"),
        ({"mask_ratio": float("inf")}, r"mask_ratio must lie between 0 and 1.*got inf"),
        ({"mask_ratio": -0.5}, r"mask_ratio must lie between 0 and 1"),
        ({"mask_ratio": 0.99}, r"got 0.99 \(0 visible\)"),
        ({"decoder_heads": 5}, "decoder_dim 32 is not a multiple of decoder_heads 5"),
        ({"decoder_depth": 0}, "decoder_depth must be at least 1, got 0"),
        ({"decoder_dim": 30, "decoder_heads": 3}, "multiple of 4, got 30"),
        ({"embed_dim": 50, "num_heads": 2}, "multiple of 4, got 50"),
        ({"num_heads": 5}, "timm cannot build 'vit_tiny_patch16_224'.*divisible"),
        ({"nonsense": 1}, "timm cannot build 'vit_tiny_patch16_224'.*nonsense"),
        ({"mean": (0.5,) * 3}, "give mean and std together"),
        ({"mean": (0.5,), "std": (0.5,)}, "mean has 1 values but images have 3 channels"),
        ({"mean": (0.5,) * 3, "std": (0.5, 0.5, 0.0)}, "std must be positive"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate > 0 would drop visible patches a second time"),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, "dynamic_img_pad=True pads images"),
        (
            {"num_classes": 10, "global_pool": "token"},
            r"its head would never be trained.*reset_classifier\(0, ''\)",
        ),
        ({"global_pool": "map"}, "its attn_pool would never be trained"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_an_encoder_of_ones_own_keeps_its_weights():
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SMALL)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    model = MAE(encoder, **DECODER)
    assert model.config is None
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=0, **SMALL)
    with pytest.raises(ValueError, match="VisionTransformerDistilled has its own _pos_embed"):
        MAE(distilled)
    with pytest.raises(ValueError, match="a Linear is not a timm VisionTransformer"):
        MAE(torch.nn.Linear(3, 3))
    theirs = type("VisionTransformer", (torch.nn.Linear,), {"__module__": "theirs"})
    with pytest.raises(ValueError, match=r"a theirs\.VisionTransformer is not a timm VisionTransformer"):
        MAE(theirs(3, 3))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 3, 32, 24), ValueError, r"\[B, 3, 32, 32\], got \[2, 3, 32, 24\]; resize"),
        (torch.zeros(2, 1, 32, 32), ValueError, r"\[B, 3, 32, 32\], got \[2, 1, 32, 32\]"),
        (torch.zeros(3, 32, 32), ValueError, r"got \[3, 32, 32\]"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), TypeError, "uint8 or floating point, got torch.int64"),
        (
            torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
            ValueError,
            "uint8 images need the model's mean and std",
        ),
        ([[0.0]], TypeError, "images must be a torch.Tensor, got list"),
        (torch.zeros(2, 3, 32, 32, device="meta"), ValueError, "images are on meta but the model is on cpu"),
    ],
    ids=["width", "channels", "rank", "int64", "uint8", "list", "device"],
)
def test_images_that_do_not_fit(images, error, message):
    with pytest.raises(error, match=message):
        build()(images)


def test_dynamic_size_still_needs_whole_patches():
    with pytest.raises(ValueError, match=r"patch size 8 x 8 does not divide images \[2, 3, 32, 36\]"):
        build(dynamic_img_size=True)(torch.zeros(2, 3, 32, 36))


def test_noise_that_does_not_fit():
    with pytest.raises(ValueError, match=r"noise must be \[2, 16\].*got \[2, 17\]"):
        build()(torch.zeros(2, 3, 32, 32), noise=torch.zeros(2, 17))


def test_pictures_need_one_or_three_channels():
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        build(in_chans=2).reconstruct(torch.zeros(1, 2, 32, 32))


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_siglip_224", "vit_base_patch16_18x2_224", "vit_dpwee_patch16_reg1_gap_256"]
)
def test_every_parameter_of_unusual_encoders_is_trained(name):
    model = build(name)
    model(torch.randn(2, 3, 32, 32)).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
