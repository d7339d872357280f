"""Values of options as text: one parser for command lines, models, poolings and targets."""

import argparse
import os

import pytest

from mimkernels._options import option_value
from mimkernels.commands.analyze.config import AnalyzeConfig
from mimkernels.commands.dense.config import DenseConfig
from mimkernels.commands.finetune.config import FinetuneConfig
from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.probe.config import ProbeConfig
from mimkernels.engine.model_names import parse_models
from mimkernels.engine.settings import add_arguments, given_arguments, is_of_type, read_settings
from mimkernels.models.targets import parse_target
from mimkernels.nn.pooling_choice import parse_pooling


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("0.5", 0.5), ("true", True), ("null", None), ("[2,2]", [2, 2]), ("gelu", "gelu"), ("", ""),
     ("2x", "2x"), ("1" * 5000, "1" * 5000), ("[" * 100_000, "[" * 100_000)],
    ids=lambda value: str(value)[:8],
)  # fmt: skip
def test_a_value_is_json_or_the_word_itself(text, value):
    assert option_value(text) == value and type(option_value(text)) is type(value)


@pytest.mark.parametrize(("text", "value"), [("2", 2), ("false", False), ("word", "word"), ("2e3", 2000.0)])
def test_all_options_are_read_alike(text, value):
    parser = argparse.ArgumentParser()
    add_arguments(parser, ProbeConfig)
    given = given_arguments(parser.parse_args(["--model-kwargs", f"depth={text}"]), ProbeConfig)
    assert given["model_kwargs"] == {"depth": value}
    assert parse_models([f"m=vit:act={text}"])[0].model_kwargs == {"act": value}
    assert parse_pooling(f"abmilp:depth={text}").options == {"depth": value}
    target = parse_target(f"features:vit_tiny_patch16_224:act_layer={text}").features
    assert target.model_kwargs == {"act_layer": value}


def test_settings_nested_thousands_deep_are_refused_by_their_file(tmp_path):
    (tmp_path / "config.json").write_text('{"a":' * 50_000)
    with pytest.raises(ValueError, match=r"config\.json' does not hold settings: "):
        read_settings(tmp_path / "config.json")


def test_numbers_beyond_floats_are_no_floats():
    assert is_of_type(10**300, float) and not is_of_type(10**400, float) and not is_of_type(-(10**400), float | None)


@pytest.mark.parametrize("kind", [PretrainConfig, FinetuneConfig, ProbeConfig, DenseConfig, AnalyzeConfig])
def test_the_output_has_one_short_name(kind):
    parser = argparse.ArgumentParser()
    add_arguments(parser, kind)
    assert parser.parse_known_args(["a model", "-o", "here"])[0].output == "here"


def test_a_name_that_is_not_utf8_can_be_drawn(tmp_path):
    folder = tmp_path / os.fsdecode(b"run\xff")
    folder.mkdir()
    (choice,) = parse_models([str(folder)])
    assert choice.name == "run\\udcff" and choice.model == str(folder)
