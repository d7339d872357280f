import argparse
import dataclasses
import json

import pytest

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.engine.settings import add_arguments, given_arguments


def parse(*words: str) -> PretrainConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser, PretrainConfig)
    return PretrainConfig(**given_arguments(parser.parse_args(list(words)), PretrainConfig))


def test_no_option_gives_the_defaults():
    assert parse() == PretrainConfig()


def test_every_field_has_an_option_of_its_type():
    config = parse(
        "--model", "vit_small_patch16_224", "--no-norm-pix-loss", "--lr", "1e-3", "--patch-size", "8",
        "--model-kwargs", "embed_dim=64", "act_layer=gelu", "drop_path_rate=0.1", "--compile", "--hflip",
    )  # fmt: skip
    assert config.model == "vit_small_patch16_224" and config.norm_pix_loss is False
    assert (config.lr, config.patch_size, config.compile, config.hflip) == (1e-3, 8, True, True)
    assert config.model_kwargs == {"embed_dim": 64, "act_layer": "gelu", "drop_path_rate": 0.1}
    parser = argparse.ArgumentParser()
    add_arguments(parser, PretrainConfig)
    options = {action.dest for action in parser._actions}
    assert {f.name for f in dataclasses.fields(PretrainConfig)} <= options


def test_saved_settings_come_back(tmp_path):
    config = parse("--model-kwargs", "depth=2", "--clip-grad", "1")
    (tmp_path / "config.json").write_text(config.to_json())
    assert PretrainConfig.load(tmp_path / "config.json") == config
    assert json.loads(config.to_json())["clip_grad"] == 1.0


def test_an_unknown_setting_is_refused_with_the_close_one():
    with pytest.raises(ValueError, match=r"'batchsize'.*'batch_size'"):
        PretrainConfig.from_dict({"batchsize": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"accum_steps": -1}, "accum_steps must be at least 1"),
        ({"mask_ratio": 0.0}, "mask_ratio must be between 0 and 1"),
        ({"mask_ratio": 1.0}, "mask_ratio must be between 0 and 1"),
        ({"mask_ratio": float("nan")}, "mask_ratio must be between 0 and 1"),
        ({"img_size": 30, "patch_size": 4}, "img_size 30 is not divisible by patch_size 4: try --img-size 28"),
        ({"decoder_dim": 30, "decoder_heads": 4}, "decoder_dim 30 is not divisible by decoder_heads 4"),
        ({"warmup_epochs": 101.0}, "warmup_epochs must be in 0..100"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"blr": float("inf")}, "blr must be positive and finite"),
        ({"workers": -1}, "workers must be 0 or more"),
        ({"in_chans": 2}, "in_chans must be 1 or 3"),
        ({"precision": "fp8"}, "precision must be one of auto, fp32, bf16, fp16"),
        ({"method": "beit"}, "method must be one of mae"),
        ({"crop_scale": 1.5}, "crop_scale must be in"),
        ({"beta2": 1.0}, "beta2 must be at least 0 and below 1, got 1.0"),
        ({"step_epoch": 101.0}, "step_epoch must be in 0..100"),
        ({"schedule": "linear"}, "schedule must be one of cosine, step"),
        ({"method": "simmim", "decoder_dim": 64}, "decoder_dim is an option of MAE, got 64 and method 'simmim'"),
        ({"target": "patch-norm"}, "target of mae must be pixels, features:MODEL, ema or bootstrap, got 'patch-norm'"),
        ({"seed": -1}, r"seed must be in 0\.\.2\^63 - 1, got -1"),
        ({"seed": 2**63}, r"seed must be in 0\.\.2\^63 - 1, got 9223372036854775808"),
        ({"method": "simmim", "mask_unit": 0}, "mask_unit must be at least 1, got 0"),
        (
            {"method": "simmim", "masking": "none", "mask_ratio": 0.3},
            "mask_ratio has no effect with masking 'none', got 0.3",
        ),
        (
            {"method": "mocov3", "val_masks": 2},
            "val_masks has no effect with method 'mocov3', which masks nothing, got 2",
        ),
        (
            {"method": "simmim", "masking": "none", "target": "ema:tokens=all", "val_masks": 2},
            "val_masks has no effect with masking 'none', got 2",
        ),
        (
            {"masking": "none", "masking_kwargs": {"x": 1}},
            "masking_kwargs has no effect with masking 'none', got {'x': 1}",
        ),
        (
            {"masking": "attention_guided", "teacher": "runs/x", "teacher_momentum": 0.5},
            "teacher_momentum has no effect on teacher 'runs/x', which stays as it is, got 0.5",
        ),
        ({"target": "ema", "norm_pix_loss": False}, "norm_pix_loss has no effect on target 'ema', got False"),
        ({"method": "dino", "local_crops": 0, "local_size": 96}, "local_size has no effect with local_crops 0, got 96"),
        ({"method": "dino", "local_crops": 0, "local_scale": 0.1}, "local_scale has no effect with local_crops 0"),
        (
            {"method": "dino", "warmup_teacher_temp": 0.03},
            "warmup_teacher_temp has no effect with warmup_teacher_temp_epochs 0, got 0.03",
        ),
    ],
)
def test_values_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**changes).check()
