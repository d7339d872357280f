import pytest
import torch

from mimkernels.commands.finetune.config import FinetuneConfig
from mimkernels.commands.pretrain.config import METHODS as OFFERED
from mimkernels.models import MAE
from mimkernels.models.build import METHODS, build_model, format_statistics, parse_statistics

SETTINGS = {
    "method": "mae", "model": "vit_tiny_patch16_224", "model_kwargs": {"embed_dim": 16, "depth": 1, "num_heads": 2},
    "img_size": 16, "in_chans": 1, "patch_size": 4, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2,
    "mask_ratio": 0.75, "norm_pix_loss": True,
}  # fmt: skip


def test_settings_give_the_model_and_the_seed_its_weights():
    torch.manual_seed(0)
    model = build_model({**SETTINGS, "epochs": 3, "a setting of tomorrow": None})
    torch.manual_seed(0)
    same = MAE.from_config(model.config)
    assert (model.grid_size, model.mean, model.std) == ((4, 4), (0.449,), (0.226,))
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in model.state_dict().items())


def test_pixel_statistics_are_those_of_the_settings():
    model = build_model({**SETTINGS, "pixel_stats": "0.2860/0.3530"})
    assert (model.mean, model.std) == ((0.286,), (0.353,))
    assert parse_statistics(format_statistics([0.1, 0.2, 0.3], [1, 2, 3]), 3) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    for wrong in ("data", "0.5", "0.5/0", "0.5,0.5/0.5", "a/b", "nan/1", "0.5/1/2"):
        with pytest.raises(ValueError, match=r"pixel_stats must be auto, imagenet, data or.*MEAN/STD"):
            build_model({**SETTINGS, "pixel_stats": wrong})


def test_every_method_of_the_command_can_be_built():
    assert set(METHODS) == {*OFFERED, *FinetuneConfig.methods}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "beit"}, f"method must be one of {', '.join(METHODS)}, got 'beit'"),
        ({"img_size": "16"}, "setting 'img_size' must be int, got str '16'"),
        ({"img_size": True}, "setting 'img_size' must be int, got bool 'True'"),
        ({"patch_size": 4.0}, "setting 'patch_size' must be int or None, got float '4.0'"),
        ({"model_kwargs": []}, r"setting 'model_kwargs' must be dict, got list '\[\]'"),
        ({"in_chans": 2}, "in_chans must be 1 or 3, got 2"),
        ({"model_kwargs": {"mean": [0.5]}}, "model_kwargs repeats mean"),
        ({"model": "hf-hub:someone/model"}, "is not a plain timm name"),
        ({"model_kwargs": {"checkpoint_path": "evil.pth"}}, "model argument 'checkpoint_path' is not allowed"),
    ],
)
def test_settings_of_a_file_open_nothing_and_are_refused_by_name(monkeypatch, changes, message):
    monkeypatch.setattr("timm.create_model", lambda *a, **k: pytest.fail("timm was asked"))
    with pytest.raises(ValueError, match=message):
        build_model({**SETTINGS, **changes})


def test_a_missing_setting_is_named():
    with pytest.raises(ValueError, match="setting 'decoder_dim' is missing"):
        build_model({name: value for name, value in SETTINGS.items() if name != "decoder_dim"})
