"""Checkpoints of SimMIM load into models of other windows and resolutions, relative positions resized as published."""

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
from mimkernels.models import SimMIM
from mimkernels.models.build import build_model
from mimkernels.models.windows import resize_tables

VIT = {
    "name": "beit_base_patch16_224", "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3,
    "mask_unit": 16,
}  # fmt: skip
SWIN = {
    "img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "mask_unit": 16,
}  # fmt: skip
MODELS = {
    "vit": VIT,
    "swin": {"name": "swin_tiny_patch4_window7_224", **SWIN},
    "swinv2": {"name": "swinv2_tiny_window8_256", **SWIN},
}


def build(kind, **changes):
    torch.manual_seed(0)
    return SimMIM.from_timm(**{**MODELS[kind], **changes})


def published_resizing(table, target_side):
    """The published interpolation of one head's table, as its authors wrote it, but for ``interp2d``.

    SciPy has removed ``interp2d``; ``RectBivariateSpline`` is the interpolating spline it computed on a grid.
    """
    from scipy.interpolate import RectBivariateSpline

    side = table.shape[0]
    left, right = 1.01, 1.5
    while right - left > 1e-6:
        q = (left + right) / 2.0
        if (1.0 - q ** (side // 2)) / (1.0 - q) > target_side // 2:
            right = q
        else:
            left = q
    places, place = [], 1
    for i in range(side // 2):
        places.append(place)
        place += q ** (i + 1)
    places = [-p for p in reversed(places)] + [0] + places
    reach = target_side // 2.0
    at = np.arange(-reach, reach + 0.1, 1.0)
    return RectBivariateSpline(places, places, table)(at, at)


@pytest.mark.parametrize(("window", "former"), [(8, 4), (4, 8), (16, 4)])
def test_tables_of_swin_are_resized_as_published(window, former):
    source, target = build("swin", window_size=former), build("swin", window_size=window)
    weights = source.simmim_state_dict()
    name = "encoder.layers.0.blocks.1.attn.relative_position_bias_table"
    weights[name] = torch.randn_like(weights[name])
    report = target.load_checkpoint(weights)
    assert f"{name}: {former} x {former} to {window} x {window} tokens" in report.resized
    assert not report.missing and name in report.loaded
    loaded = target.encoder.layers[0].blocks[1].attn.relative_position_bias_table
    for head in range(2):
        theirs = published_resizing(weights[name][:, head].view(2 * former - 1, -1).double().numpy(), 2 * window - 1)
        ours = loaded[:, head].detach().view(2 * window - 1, -1)
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-5)
    images = torch.randn(2, 3, 64, 64)
    assert target(images, seed=0).loss.isfinite()


def test_a_constant_table_stays_constant_and_each_entry_of_the_centre_where_it_is():
    source, target = build("swin", window_size=4), build("swin", window_size=8)
    weights = source.simmim_state_dict()
    name = "encoder.layers.0.blocks.0.attn.relative_position_bias_table"
    rows, columns = torch.meshgrid(torch.arange(-3.0, 4), torch.arange(-3.0, 4), indexing="ij")
    weights[name] = torch.stack((torch.full_like(rows, 0.5), (rows + 10 * columns)), dim=-1).flatten(0, 1)
    target.load_checkpoint(weights)
    flat, sloped = target.encoder.layers[0].blocks[0].attn.relative_position_bias_table.view(15, 15, 2).unbind(-1)
    torch.testing.assert_close(flat, torch.full((15, 15), 0.5))
    # Neighbours stay one position away; the border, 3 before and 7 now, keeps the value of the border.
    expected = torch.tensor([1.0, -1, 10, -10, 3, -33])
    at = torch.stack([sloped[8, 7], sloped[6, 7], sloped[7, 8], sloped[7, 6], sloped[14, 7], sloped[0, 0]])
    torch.testing.assert_close(at, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [48, (64, 32)])
def test_the_vit_of_another_resolution_keeps_the_rows_of_the_cls_token(size):
    source, target = build("vit"), build("vit", img_size=size)
    weights = source.simmim_state_dict()
    name = "encoder.rel_pos_bias.relative_position_bias_table"
    weights[name] = torch.randn_like(weights[name])
    report = target.load_checkpoint(weights)
    rows, columns = target.grid_size
    assert report.resized == (f"{name}: 4 x 4 to {rows} x {columns} tokens",)
    loaded = target.encoder.rel_pos_bias.relative_position_bias_table
    assert torch.equal(loaded[-3:], weights[name][-3:])
    if size == 48:
        theirs = published_resizing(weights[name][:-3, 1].view(7, 7).double().numpy(), 11)
        np.testing.assert_allclose(loaded[:-3, 1].detach().view(11, 11).numpy(), theirs, rtol=0, atol=1e-5)


def test_the_same_window_is_left_as_it_is():
    for kind in MODELS:
        source, target = build(kind), build(kind)
        assert target.load_checkpoint(source.simmim_state_dict()).resized == ()
        for name, tensor in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], tensor), name


def test_coordinates_of_swin_v2_are_scaled_by_the_checkpoints_window():
    source, target = build("swinv2"), build("swinv2", window_size=8)
    report = target.load_checkpoint(source.simmim_state_dict())
    assert "encoder.layers.0.blocks.0.attn: 4 x 4 to 8 x 8 tokens" in report.resized
    told = build("swinv2", window_size=8, pretrained_window_sizes=(4, 4))
    told.load_checkpoint(source.state_dict())  # of timm's names, which hold no window
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(target(images, seed=0).loss, told(images, seed=0).loss)
    # The run's settings say so, and a model of the third window finds the first in a file of the second.
    assert target.config["pretrained_window_sizes"] == [4, 4]
    again = SimMIM.from_config(target.config)
    again.load_state_dict(target.state_dict())
    assert torch.equal(target(images, seed=0).loss, again(images, seed=0).loss)
    third = build("swinv2", window_size=2)
    third.load_checkpoint(target.simmim_state_dict())
    assert third.config["pretrained_window_sizes"] == [4, 4]


def test_settings_with_former_windows_build_the_model():
    source, target = build("swinv2"), build("swinv2", window_size=8)
    target.load_checkpoint(source.simmim_state_dict())
    own = ("name", "img_size", "in_chans", "patch_size", "mask_unit", "mask_ratio", "target", "target_dim", "loss",
           "mean", "std", "attention", "mlp")  # fmt: skip
    settings = {name: target.config[name] for name in own[1:9]}
    arguments = {name: value for name, value in target.config.items() if name not in own}
    built = build_model({"method": "simmim", "model": target.config["name"], "model_kwargs": arguments, **settings})
    assert built.encoder.layers[0].blocks[0].attn.pretrained_window_size == (4, 4)


def test_what_cannot_be_resized_is_refused_by_name():
    model = build("swin", window_size=8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "encoder.layers.0.blocks.0.attn.relative_position_bias_table"
    for rows, message in (
        (2 * 4 - 1, rf"{name}: 7 relative positions in the checkpoint, 225 in the model.*8 x 8.*no square window"),
        (9, rf"{name}: 9 relative.*a window of 2 x 2 tokens is too small to be resized to 8 x 8.*needs 3 x 3"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_checkpoint({**build("swin").simmim_state_dict(), name: torch.zeros(rows, 2)})
    with pytest.raises(ValueError, match=r"shapes differ.*relative_position_bias_table: checkpoint \[49, 3\]"):
        model.load_checkpoint({**build("swin").simmim_state_dict(), name: torch.zeros(49, 3)})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_table_keeps_its_dtype():
    weights = {name: tensor.half() for name, tensor in build("swin").simmim_state_dict().items()}
    resized, told = resize_tables(weights, build("swin", window_size=8).encoder)
    assert len(told) == 4 and {tensor.dtype for tensor in resized.values()} == {torch.float16}


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e3, float("inf"), float("nan")])
def test_coordinates_that_no_window_makes_tell_nothing(value):
    weights = build("swinv2").simmim_state_dict()
    for name, tensor in weights.items():
        if name.endswith("relative_coords_table"):
            weights[name] = torch.full_like(tensor, value)
    assert build("swinv2").load_checkpoint(weights).resized == ()


def test_tables_that_hold_no_values_are_refused():
    name = "encoder.layers.0.blocks.0.attn.relative_position_bias_table"
    weights = build("swin").simmim_state_dict()
    for odd in (weights[name].to_sparse(), weights[name].to("meta"), weights[name].long()):
        with pytest.raises(ValueError, match=rf"(?s)nothing was loaded.*{name}"):
            build("swin", window_size=8).load_checkpoint({**weights, name: odd})
