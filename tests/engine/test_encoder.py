"""Encoders of published checkpoints, by the names and the parts of their files."""

import argparse

import pytest
import torch

from mimkernels.engine.encoder import load_encoder
from mimkernels.engine.model_names import ModelChoice, parse_models
from mimkernels.nn.encoder import create_encoder

SIZE = {"img_size": 32, "patch_size": 8}
SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3}


def encoder_weights(seed: int, **kwargs) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return create_encoder("vit_tiny_patch16_224", **SIZE, **SMALL, **kwargs).state_dict()


def named(prefix: str, weights: dict[str, torch.Tensor], *others: str) -> dict[str, torch.Tensor]:
    return {**{prefix + name: value for name, value in weights.items()}, **{name: torch.ones(3) for name in others}}


@pytest.mark.parametrize("channels", [2, 4])
def test_encoders_of_other_than_grey_or_colour_images_are_refused(channels):
    choice = ModelChoice("m", "vit_tiny_patch16_224", None, {**SMALL, "in_chans": channels}, False, 32)
    with pytest.raises(ValueError, match=f"takes images of {channels} channels; those that are read have 3, or 1"):
        load_encoder(choice)


def test_random_weights_are_not_asked_of_what_has_its_own(tmp_path):
    torch.save(encoder_weights(0), tmp_path / "weights.pth")
    for place in (tmp_path, tmp_path / "weights.pth"):
        (choice,) = parse_models([f"{place}:pretrained=false"])
        with pytest.raises(
            ValueError, match=f"pretrained=false .* takes a timm name .*{place.name}' has weights of its"
        ):
            load_encoder(choice)


W, OTHER = encoder_weights(0), encoder_weights(1)
FLAT = encoder_weights(0, class_token=False)
PUBLISHED = {
    "dino": {
        "student": named("module.backbone.", OTHER, "module.head.mlp.0.weight"),
        "teacher": named("backbone.", W, "head.mlp.0.weight"),
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_tiny"),
    },
    "dino, backbone only": W,
    "ibot": {"state_dict": named("", W, "masked_embed")},
    "mocov3": {
        "epoch": 1,
        "state_dict": {
            **named("module.base_encoder.", W, "module.base_encoder.head.0.weight", "module.predictor.0.weight"),
            **named("module.momentum_encoder.", OTHER, "module.momentum_encoder.head.0.weight"),
        },
    },
    "ijepa": {
        "encoder": named("module.", encoder_weights(1, class_token=False)),
        "predictor": {"module.mask_token": torch.ones(3)},
        "target_encoder": named("module.", FLAT),
    },
    "mae": {"model": named("", W, "mask_token", "decoder_pos_embed")},
    "simmim": {"model": named("encoder.", W, "decoder.0.weight", "encoder.mask_token")},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_give_the_encoder_that_is_evaluated(tmp_path, name):
    torch.save(PUBLISHED[name], tmp_path / "file.pth")
    choice = ModelChoice("x", str(tmp_path / "file.pth"), arch="vit_tiny_patch16_224", model_kwargs=dict(SMALL))
    encoder = load_encoder(choice)
    wanted = FLAT if name == "ijepa" else W
    for key, value in encoder.model.state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=0)
    assert encoder.img_size == 32 and encoder.num_prefix == (0 if name == "ijepa" else 1)
    part = {"dino": "(teacher)", "ibot": "(state_dict)", "mocov3": "(state_dict)", "ijepa": "(target_encoder)"}
    assert part.get(name, "") in encoder.title
