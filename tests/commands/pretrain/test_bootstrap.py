"""``pretrain --target bootstrap``: at the end of a stage the student becomes the teacher and begins anew (dBOT)."""

import io

import pytest
import torch

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.features import FeatureTeachers, load_teachers
from mimkernels.commands.pretrain.presets import PRESETS
from mimkernels.commands.pretrain.run import pretrain
from mimkernels.engine.checkpoint import load
from mimkernels.engine.training.history import read_entries
from mimkernels.models.build import build_model
from mimkernels.models.targets import FeatureTarget, parse_target
from tests.commands.pretrain.test_features import DENSE, QUICK
from tests.commands.pretrain.test_run import assert_same_bits, losses, stop_after

# Three stages of one epoch, each of 2 steps.
STAGES = {**DENSE, "epochs": 3, "pictures": 0, "target": "bootstrap:stages=3", "warmup_epochs": 0.5, "save_every": 1.0,
          "keep_checkpoints": 9}  # fmt: skip
BIAS = "encoder.patch_embed.proj.bias"


@pytest.fixture(scope="module")
def whole(tiny_settings, tmp_path_factory):
    """A run without interruption, and what it said."""
    stream = io.StringIO()
    output = tmp_path_factory.mktemp("runs") / "whole"
    config = PretrainConfig(**{**tiny_settings, **STAGES, "output": str(output)})
    return pretrain(config, stream=stream), stream.getvalue()


def checkpoint(folder, step):
    return load(folder / "checkpoints" / ("final.pt" if step == 6 else f"step-{step:08d}.pt"))


def test_words():
    assert parse_target("bootstrap").features == FeatureTarget(None, stages=2)
    text = "bootstrap:stages=4,layer=11,beta=2"
    assert parse_target(text).features == FeatureTarget(None, 11, beta=2.0, stages=4)
    with pytest.raises(ValueError, match="stages must be at least 1, got 0"):
        parse_target("bootstrap:stages=0")
    with pytest.raises(ValueError, match="got 'stages=2'"):
        parse_target("ema:stages=2")
    with pytest.raises(ValueError, match="stages=NUMBER, got 'momentum=1'"):
        parse_target("bootstrap:momentum=1")


def test_the_student_of_a_stage_teaches_the_next(whole, tiny):
    """At a border a checkpoint has the trained student still, and the teacher it learned from."""
    result, said = whole
    torch.manual_seed(0)
    first = build_model(load(result.output / "checkpoints" / "final.pt")["config"])
    ends = [checkpoint(result.output, step) for step in (2, 4, 6)]
    before = dict(first.encoder.state_dict())
    for content in ends:
        assert_same_bits(content["target_teacher"], before)
        before = {name.removeprefix("encoder."): tensor for name, tensor in content["model"].items()
                  if name.startswith("encoder.")}  # fmt: skip
    assert "stage 2 of 3: the encoder is the teacher, the model begins anew" in said and "stage 3 of 3" in said
    assert said.count("stage ") == said.count("stage 2 of 3") + said.count("stage 3 of 3") + said.count("stage before")


def test_all_weights_are_drawn_again_but_one_bias(tiny):
    """As dBOT's ``initialize_weights``, which leaves the convolution's bias."""
    config = tiny(**STAGES)
    torch.manual_seed(0)
    model = build_model(config.to_dict())
    teachers = FeatureTeachers(config, model, load_teachers(config))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.5)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    teachers.begin_stage(1)
    assert torch.equal(torch.get_rng_state(), generator)
    encoder = {name: tensor for name, tensor in trained.items() if name.startswith("encoder.")}
    assert_same_bits({f"encoder.{name}": tensor for name, tensor in teachers.state().items()}, encoder)
    second = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in second.items():
        assert torch.equal(tensor, trained[name]) == (name == BIAS), name
    assert abs(float(second["encoder.blocks.0.attn.qkv.weight"].mean())) < 0.05
    teachers.begin_stage(2)
    assert not torch.equal(model.state_dict()["mask_token"], second["mask_token"])


def test_each_stage_has_its_own_warm_up_and_cosine(whole):
    entries = read_entries(whole[0].output / "metrics.jsonl")
    assert [entry["lr"] for entry in entries] == pytest.approx([0.0, 1e-3] * 3)
    page = whole[0].report.read_text()
    assert "Dashed lines end a stage" in page and "end of stage 2" in page and whole[0].content.stage_ends == [1.0, 2.0]
    assert (
        "the encoder of the stage before, at first with random weights, in 3 stages"
        in (whole[0].content.run_facts["Target"])
    )
    assert "moves" not in whole[0].content.verdict and "overfits" not in whole[0].content.verdict


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_run_goes_on_bit_for_bit_inside_a_stage_and_at_its_border(tiny, whole, tmp_path, monkeypatch, step):
    part = tiny(**STAGES, output=str(tmp_path / "part"))
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        assert pretrain(part).stopped_by
    pretrain(part, resume="auto")
    assert losses(tmp_path / "part") == losses(whole[0].output)
    one, other = (checkpoint(folder, 6) for folder in (whole[0].output, tmp_path / "part"))
    for name in ("model", "target_teacher", "optimizer"):
        assert_same_bits(one[name], other[name])


def test_ends_of_stages_do_not_move(whole, tiny, tmp_path):
    config = tiny(**{**STAGES, "epochs": 6}, output=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="epochs 3 -> 6 would move the ends of the 3 stages"):
        pretrain(config, resume=str(whole[0].output / "checkpoints" / "step-00000004.pt"))


@pytest.mark.parametrize(("target", "stages"), [("bootstrap:stages=1", 1), ("ema", 1)])
def test_a_run_that_goes_on_keeps_its_stages(whole, tiny, tmp_path, target, stages):
    config = tiny(**{**STAGES, "target": target}, output=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=f"has 3 stages, '{target}.* has {stages}: their ends would move"):
        pretrain(config, resume=str(whole[0].output / "checkpoints" / "step-00000004.pt"))
    assert not (tmp_path / "run").exists()


def test_the_preset_is_the_published_run():
    config = PretrainConfig(**PRESETS["dbot-vit-b-1600"])
    config.check()
    target = parse_target(config.target).features
    assert (config.epochs // target.stages, target.beta, target.layer, target.loss) == (800, 2.0, 11, "smooth-l1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**STAGES, "epochs": 4}, "has 3 equal stages, epochs must be a multiple of it, got 4"),
        ({**STAGES, "warmup_epochs": 1.5}, "warmup_epochs is counted in each of the 3 stages .* 1 epochs, got 1.5"),
        ({**STAGES, "momentum": 0.9}, "momentum is that of target ema, got 0.9 and target 'bootstrap:stages=3'"),
        ({**STAGES, "target": "ema + bootstrap", "epochs": 2}, "'ema' and 'bootstrap' both keep a copy"),
        ({**QUICK, "target": "bootstrap:layer=7", "epochs": 2}, "wants block 7, the encoder .* has 1 blocks"),
    ],
)
def test_stages_that_cannot_be_are_refused(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        pretrain(tiny(**settings))
